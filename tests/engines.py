"""Where the stages of a disturbed grid run, and which processes can be killed there."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests import slurm
from tests.aftermath import living


class Skipped(Exception):
    """A part of the campaign that this machine cannot have."""


class Local:
    """Four threads of the coordinator."""

    victims = {"stage": 10, "fork server": 1, "coordinator": 1}  # and how often each, in proportion

    def __init__(self, folder):
        self.folder = folder

    def settings(self):
        """Of the section [cluster]."""
        return {"engine": "local", "workers": 4}

    def tend(self):
        """Replace what was killed, as whoever keeps the workers would."""

    def pid_of(self, victim, stage, coordinator):
        """The process that a victim is, seen from a stage's process."""
        if victim in ("coordinator", "stage"):
            return coordinator if victim == "coordinator" else stage
        fork_server = psutil.Process(stage).ppid()
        return fork_server if victim == "fork server" else psutil.Process(fork_server).ppid()

    def left_over(self):
        """What a grid that is whole has left with the workers."""
        return []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Dask(Local):
    """Four workers of a Dask scheduler that runs already."""

    victims = {"stage": 7, "worker": 2, "fork server": 1, "coordinator": 1}

    def start(self, *words):
        """A process of Dask, in a folder that is not the grid's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EPT_")}
        paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(self.folder)}
        with open(self.folder / "dask.log", "ab") as file:
            command = [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]]
            return subprocess.Popen(command, cwd=self.folder, env=kept | paths | {"OMP_NUM_THREADS": "1", "EPT_THREADS": "1"}, stdout=file, stderr=file)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.told = self.folder / "scheduler.json"
        self.scheduler = self.start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(self.told))
        slurm.until(self.told.exists, 60, "a scheduler of Dask")
        self.workers = []
        self.tend()
        return self

    def __exit__(self, *_):
        for process in (*self.workers, self.scheduler):  # nothing is at work any more; what they have forked ends with them
            process.kill()
            process.wait()
        with suppress(TimeoutError):
            slurm.until(lambda: not living(self.folder), 15, "the end of what the workers have forked")

    def settings(self):
        return {"engine": json.loads(self.told.read_text())["address"], "workers": 4}

    def tend(self):
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < 4:
            words = ("--scheduler-file", str(self.told), "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--local-directory", str(self.folder))
            self.workers.append(self.start("dask_worker", *words))


class OnSlurm(Local):
    """Four jobs of a Slurm that is started for it."""

    victims = {"stage": 6, "worker": 1, "job": 2, "coordinator": 1}

    def __enter__(self):
        if absent := slurm.missing():
            raise Skipped(f"Slurm is not installed: {', '.join(absent)} not found")
        self.opened = ExitStack()
        self.slurm = self.opened.enter_context(slurm.Slurm(self.folder))
        os.environ |= self.slurm.environment
        return self

    def __exit__(self, *_):
        self.opened.close()
        for name in self.slurm.environment:
            os.environ.pop(name, None)

    def settings(self):
        return {"engine": "slurm", "workers": 4, "memory": "512MB", "walltime": "01:00:00"}

    def left_over(self):
        with suppress(TimeoutError):
            slurm.until(lambda: not self.slurm.jobs(), 30, "the end of the jobs")
        return [f"job {job} is {state}" for job, state in self.slurm.jobs().items()]

    def job_of(self, stage):
        """The job in which a stage's process runs."""
        worker = psutil.Process(self.pid_of("worker", stage, None))
        return worker.environ()["SLURM_JOB_ID"]
