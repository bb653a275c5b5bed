"""A grid that weighs nothing, to try the campaign itself: stages of every kind that sleep and write a line, under the real coordinator."""

import shutil
import subprocess

import yaml

from tests.grids import Grid
from tests.letters import DVC

NEEDS = {
    "plan": [],
    "backbone": ["plan"],
    "prepare-a": ["plan"],
    "prepare-b": ["plan"],
    "reference": ["prepare-a", "backbone"],
    "source": ["prepare-b", "backbone"],
    "shared": ["source"],
    "search": ["shared"],
    "train-a": ["prepare-a", "search"],
    "train-b": ["prepare-b", "shared"],
    "sweep": ["prepare-b", "search"],
    "evaluate-a": ["train-a"],
    "evaluate-b": ["train-b"],
    "report": ["evaluate-a", "evaluate-b", "sweep", "reference"],
}
PROGRAM = """
import sys
from pathlib import Path

from dvc.exceptions import DvcException

from ept.workflow.clusters import Cluster
from ept.workflow.progress import Progress
from ept.workflow.scheduling import reproduce
from ept.workflow.stages import Stages, only_coordinator
from ept.workflow.workers import Setup

if __name__ == "__main__":
    root = Path.cwd()
    try:
        with only_coordinator(root):
            stages, setup = Stages(root), Setup(f"{root}/runs/logs", f"{root}/.dvc/tmp/stages")
            if "--dry-run" in sys.argv:
                sys.exit(0)
            summary = reproduce(stages, Cluster.read(root / "settings.ini"), setup, Progress("light", journal=f"{setup.logs}/stages.log"))
    except (OSError, RuntimeError, DvcException) as error:
        sys.exit(f"error: {error}")
    sys.exit(130 if summary.stopped else 0 if summary.complete else 1)
"""
SCRIPT = """\
name=$1; shift
mkdir -p results
cat /dev/null "$@" > results/$name.part
sleep 0.3
echo $name >> results/$name.part
mv results/$name.part results/$name
echo "$name: 0.3 s, see results"
"""


class Light(Grid):
    """Stages of every kind, without PyTorch."""

    def __init__(self, folder, origin=None):
        self.scratch, self.root, self.folder = folder / "tmp", folder / "grid", folder / "grid"
        self.scratch.mkdir(parents=True)
        if origin is not None:
            shutil.copytree(origin.root, self.root, symlinks=True, dirs_exist_ok=True)
            return
        (self.root / "nbs" / "pipelines").mkdir(parents=True)
        (self.root / "nbs" / "pipelines" / "reproduce.py").write_text(PROGRAM)
        (self.root / "settings.ini").write_text("[cluster]\nengine = local\nworkers = 4\ngpus = -1\nmemory = 1GB\nwalltime = 01:00:00\n")
        (self.root / "stage.sh").write_text(SCRIPT)
        paths = {name: [f"results/{other}" for other in needs] for name, needs in NEEDS.items()}
        stages = {name: {"cmd": " ".join(["sh stage.sh", name, *found]), "deps": found, "outs": [{f"results/{name}": {"cache": False}}]} for name, found in paths.items()}
        (self.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        subprocess.run([*DVC, "init", "-q", "--no-scm"], cwd=self.root, check=True)
        (self.root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
