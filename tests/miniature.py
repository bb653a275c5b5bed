"""A miniature of the repository in a temporary folder: the real notebooks, modules and files of DVC; two tasks, three methods, two
to forty steps. Only the backbone is a stand-in, a tiny T5 with random weights.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import forks
from tests.conftest import byte_tokenizer, tiny_t5

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CACHES = shutil.ignore_patterns(".git", ".venv", "cache", "tmp", "__pycache__", ".ipynb_checkpoints", "dvc.lock", "*.egg-info")
LEFT_OUT = {"runs", "results", "data", "backbone", "tasks", "profiles", "bench", "updates"}  # of the root; ept/data is code

PARAMETERS = {
    "profile": "embedded",
    "backbone": {"name": "embedded", "folder": "backbone"},
    "data": {"source": "embedded", "folder": "data", "subsample": {"validation": 16, "test": 24}},
    "grid": {"references": ["frozen"], "methods": ["pt", "ept"], "seeds": [0]},
    "training": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "prompt_length": 60, "short_length": 8, "max_length": 96},
    "methods": {"frozen": {}, "pt": {}, "ept": {}},
    "tasks": {"cola": {}, "cb": {}},
}


TASKS = ("cola", "cb")


class Clone:
    """A miniature of the repository, and the commands that are given in it."""

    def __init__(self, root):
        self.root = self.folder = root
        shutil.copytree(ROOT, root, symlinks=True, ignore=lambda folder, names: CACHES(folder, names) | (LEFT_OUT & set(names) if Path(folder) == ROOT else set()))
        tiny_t5().save_pretrained(root / "backbone")
        byte_tokenizer(eos=True).save_pretrained(root / "backbone")
        self.write(PARAMETERS)
        self.git("init", "-q")
        self.dvc("add", "-q", "backbone")

    def write(self, parameters):
        """Parameters, and the files of DVC that belong to them."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))
        self.call("nbs/pipelines/layout.py")

    def git(self, *words):
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *who, *words], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def dvc(self, *words, folder=None, fails=False):
        return self.call("-m", "dvc", *words, folder=folder, fails=fails)

    def environment(self):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("EPT_")}
        return {**kept, "EPT_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def python(self, *command, folder):
        """What `python command` does in a folder; the command is forked, and so is what it starts as `python`: DVC's stages."""
        environment = self.environment()
        return forks.run(*command, cwd=folder, env=environment | {"PATH": f"{forks.named_python()}{os.pathsep}{environment['PATH']}"})

    def call(self, *command, folder=None, fails=False):
        done = self.python(*command, folder=folder or self.root)
        assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def run(self, *arguments, **options):
        return self.call("nbs/pipelines/run.py", *arguments, **options)

    def reproduce(self, *options, jobs=2):
        """Stages that `make reproduce` has run."""
        return sorted(set(self.order(*options, jobs=jobs)))

    def order(self, *options, jobs=2):
        """The same, in the order in which they have begun; twice, what was run twice."""
        journal = self.root / "runs" / "logs" / "stages.log"
        journal.unlink(missing_ok=True)
        self.said = self.call("nbs/pipelines/reproduce.py", "--jobs", str(jobs), *options)
        lines = journal.read_text().splitlines() if journal.exists() else []
        return self.stages("".join(f"Running stage '{line.split()[2]}'" for line in lines if line.split()[1] == "begins"))

    def due(self, *words):
        """Stages that plain `dvc repro` would run once the plan is there."""
        self.repro("--single-item", "plan")
        return sorted(self.stages(self.dvc("repro", "--dry", *words)))

    @staticmethod
    def stages(text):
        """Stages that DVC says it runs."""
        return [stage.removeprefix("tasks/").replace("/dvc.yaml:", ":").removeprefix("dvc.yaml:") for stage in re.findall(r"Running stage '([^']+)'", text)]

    def repro(self, *words):
        """Stages that plain `dvc repro` has run."""
        return sorted(self.stages(self.dvc("repro", *words)))

    def files(self, folder):
        base = self.root / folder
        return {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}
