"""The grid that `make torture` disturbs: a miniature of the repository with stages of every kind, and what it is if nobody disturbs it."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests import aftermath
from tests.miniature import PARAMETERS, Clone

KINDS = ("plan", "backbone", "prepare", "reference", "search", "source", "shared", "train", "evaluate", "sweep", "report")
EVERY_KIND = {
    **PARAMETERS,
    "grid": {"references": ["frozen"], "methods": ["ept"], "seeds": [0], "transfer": ["mpt"], "sources": ["cola", "cb"]},
    "training": {**PARAMETERS["training"], "steps": 8, "evaluate_every": 2},
    "sources": {"steps": 8, "shared_steps": 8},
    "search": {"tasks": ["cb"], "seeds": [7], "trials": 2, "steps": 2, "rates": {"learning_rate": [0.01, 3]}, "like": {"mpt": "ept"}},
    "sweep": {"tasks": ["cb"], "seeds": [0], "sizes": ["rank-1"]},
    "methods": {"frozen": {}, "ept": {}, "mpt": {}},
}
REPRODUCE = "nbs/pipelines/reproduce.py"
CLEANED = 15  # seconds until what a killed coordinator has started has to be gone


class Grid(Clone):
    """A miniature with stages of every kind, in a folder with room for temporary files beside it."""

    def __init__(self, folder, origin=None):
        self.scratch, root = folder / "tmp", folder / "grid"
        self.scratch.mkdir(parents=True)
        if origin is None:
            super().__init__(root)
            self.write(EVERY_KIND)
        else:
            self.root = self.folder = root
            shutil.copytree(origin.root, root, symlinks=True, dirs_exist_ok=True)

    @classmethod
    def there(cls, folder):
        """One that was made before."""
        grid = cls.__new__(cls)
        grid.scratch, grid.root = folder / "tmp", folder / "grid"
        grid.folder, grid.said = grid.root, folder / "said"
        return grid

    @property
    def costs(self):
        """What the runs have cost, as it is published; the same work costs what it has cost before."""
        return self.root / "results" / "costs.csv"

    def environment(self):
        usual = {name: value for name, value in super().environment().items() if name != "PYTHONDONTWRITEBYTECODE"}
        return usual | {"TMPDIR": str(self.scratch)}

    def settle(self, **entries):
        """Write entries of the section [cluster] of the settings."""
        file = self.root / "settings.ini"
        text = file.read_text()
        for name, value in entries.items():
            text = re.sub(rf"(?m)^{name} =.*$", f"{name} = {value}", text)
        file.write_text(text)

    def start(self, *command, program=()):
        """A command of this Python in the grid's folder; what it says is in `said`, behind what others have said."""
        self.said = self.scratch.with_name("said")
        with open(self.said, "ab") as file:
            return subprocess.Popen([sys.executable, *program, *command], cwd=self.root, env=self.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def stages_at_work(self):
        """Id of a stage's first process -> the name of its log, for all that run."""
        logs, found = f"{self.root}/runs/logs/", {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                said, pid = os.readlink(process / "fd" / "1"), int(process.name)
                name = said.removeprefix(logs)
                if name != said and name.endswith(".log") and "/" not in name and os.getpgid(pid) == pid:
                    found[pid] = name.removesuffix(".log")
        return found

    def note(self, *words):
        """A line of the stages' journal."""
        file = self.root / "runs" / "logs" / "stages.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as journal:
            print(time.strftime("%Y-%m-%dT%H:%M:%S"), *words, file=journal)

    def forget(self):
        """As if no stage had ever run; published costs stay, as in a clone, since seconds differ from time to time and are in the report."""
        costs = self.costs.read_bytes()
        for folder in ("runs", "results"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        self.costs.parent.mkdir()
        self.costs.write_bytes(costs)
        for lock in self.root.rglob("dvc.lock"):
            lock.unlink()


def kind_of(log):
    """The kind of the stage that a log is of."""
    return next(kind for kind in KINDS if re.search(rf"(^|-){kind}(-|@|$)", log))


def left_in_peace(grid, names):
    """What is left over of a grid when all that was killed has had the time to end."""
    deadline = time.monotonic() + CLEANED
    while (left := aftermath.left_over(grid.root, names, grid.scratch)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


@dataclass(frozen=True)
class Undisturbed:
    """What a grid is in the end if nothing happens to it."""

    origin: Grid  # as it is before
    stages: tuple[str, ...]
    results: dict[str, str]
    names: set[str]
    seconds: dict[str, float]  # of a kind of stage, the longest


def undisturbed(folder, make):
    """Run the whole grid once, in a copy, and look at it; what an earlier campaign has run in the same folder is looked at again."""
    if not (folder / "undisturbed").exists():
        grid = make(folder / "undisturbed", make(folder / "origin"))
        status = grid.start(REPRODUCE, "--jobs", "4").wait()
        if status:
            raise RuntimeError(f"the grid does not run where nothing disturbs it:\n{grid.said.read_text()[-2000:]}")
    origin, grid = (make.there(folder / name) for name in ("origin", "undisturbed"))
    origin.costs.parent.mkdir(exist_ok=True)
    shutil.copy(grid.costs, origin.costs)
    logs = [log for log in (grid.root / "runs" / "logs").glob("*.log") if log.stem != "stages"]
    seconds = dict.fromkeys(KINDS, 1.0)
    for log in logs:
        seconds[kind_of(log.stem)] = max([seconds[kind_of(log.stem)], *(float(took) for took in re.findall(r": (\d+\.\d) s, see ", log.read_text(errors="replace")))])
    if lacking := set(KINDS) - {kind_of(log.stem) for log in logs}:
        raise RuntimeError(f"the grid lacks stages of these kinds: {lacking}")
    names, journal = aftermath.names(grid.root), aftermath.journal_of(grid.root)
    if wrong := left_in_peace(grid, names):
        raise RuntimeError(f"an undisturbed grid leaves something behind: {wrong}")
    stages = tuple(line.split()[2] for line in journal if line.split()[1] == "ended")
    return Undisturbed(origin, stages, aftermath.results(grid.root), names, seconds)
