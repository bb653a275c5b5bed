"""A small DVC project for tests of the workflow, and what waits for its processes."""

import json
import os
import sys
import textwrap
import time

import psutil

import forks
from ept.workflow.clusters import Cluster
from ept.workflow.scheduling import reproduce
from ept.workflow.stages import Stages
from ept.workflow.workers import Setup

DVC = [sys.executable, "-m", "dvc"]
LETTERS = "abcd"


HELD = "while ! test -e go; do sleep 0.05; done;"  # a stage with it goes on when there is a file `go`


class Project:
    """A DVC project: a number is copied from a table for each letter, in a file of its own, and all are joined."""

    def __init__(self, folder, slow="", extra=""):
        self.folder = folder
        assert self.dvc("init", "-q", "--no-scm").returncode == 0
        (folder / "table").write_text("1\n")
        letters = "".join(f"  {x}:\n    cmd: {slow} echo {x} $(cat table) >> {x}.txt; echo {x} >> ran\n    deps: [table]\n    outs: [{x}.txt: {{cache: false}}]\n" for x in LETTERS)
        joined = f"  joined:\n    cmd: cat ?.txt > joined; echo joined >> ran\n    deps: [{', '.join(f'{x}.txt' for x in LETTERS)}]\n    outs: [joined]\n"
        (folder / "dvc.yaml").write_text("stages:\n" + letters + joined + textwrap.indent(textwrap.dedent(extra), "  "))

    def reproduce(self, targets=("dvc.yaml",), watch=None, allow_missing=False, **cluster):
        """Bring it up to date with us."""
        return reproduce(Stages(self.folder, targets), Cluster(**{"gpus": 0} | cluster), self.setup, watch, allow_missing)

    @property
    def setup(self):
        return Setup(str(self.folder / "logs"), str(self.folder / ".dvc" / "tmp" / "stages"))

    def dvc(self, *words):
        """A command of DVC itself."""
        return forks.run("-m", "dvc", *words, cwd=self.folder)

    def ran(self):
        """The stages that have come to their end, in order."""
        file = self.folder / "ran"
        return file.read_text().split() if file.exists() else []

    def results(self):
        """What is there in the end."""
        return {name: (self.folder / name).read_text() for name in ("joined", "dvc.lock", *(f"{x}.txt" for x in LETTERS))}


def below(folder):
    """Processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cwd() or any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.pid != os.getpid()]


def wait_until(holds, seconds=120):
    """Wait for something to become true; only where it does not, or the machine is very busy, does that take long."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
    return found


PASS = """
import json, sys
from ept.workflow.clusters import Cluster
from ept.workflow.scheduling import reproduce
from ept.workflow.stages import Stages, keep_others_away, only_coordinator
from ept.workflow.workers import Setup

if __name__ == "__main__":
    root, cluster = sys.argv[1], Cluster(**json.loads(sys.argv[2]))
    with only_coordinator(root), keep_others_away(root, print):
        summary = reproduce(Stages(root), cluster, Setup(f"{root}/logs", f"{root}/.dvc/tmp/stages"))
    sys.exit(130 if summary.stopped else 0 if summary.complete else 1)
"""


def one_pass(project, program, **cluster):
    """The command that brings a project up to date in a process of its own; `program` is where its script is written."""
    program.write_text(PASS)
    return [sys.executable, str(program), str(project.folder), json.dumps({"gpus": 0} | cluster)]
