"""What a person sees while a grid runs: a line for each finished run, and below them one for the whole and one for each job.

    [23/39] ept rte 74.0 (majority 47.0) 19 s, 3:10 left

It reads what the jobs print, writes it to their logs, and understands five things of it: which stage DVC begins or skips, the
steps of a training, a trial of a search, and that a stage is done. Where the output is no terminal, the finished runs are plain lines and the rest is
left out.
"""

import csv
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

STAGE = r"tage '(?:tasks/([\w.-]+)/)?(?:dvc\.yaml:)?([\w-]+)(?:@([\w.-]+))?'"  # task, kind of stage, the rest of its name
BEGIN, SKIP = re.compile(f"Running s{STAGE}"), re.compile(f"S{STAGE} didn't change, skipping")
STEP = re.compile(r"\|\s*(\d+)/(\d+) \[")
TRIAL = re.compile(r"^trial \d+/\d+ of ")
DONE = re.compile(r"^(evaluate|reference|sweep) ([\w.-]+) .*: [\d.]+ s, see .*?/(?:evaluate|reference|sweep)-([\w.-]+)\.ipynb")
FAIL = re.compile(r"^(?:ERROR|error): (.+)")
AROUND = 2.0  # seconds of a run beside its training
LAST = ("evaluate", "reference", "sweep")  # the stages that end a run


def duration(seconds):
    "Minutes and seconds, as on a clock."
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    "Lines on the terminal about the runs of a profile."

    def __init__(self, profile, console=None):
        self.profile, self.folder = profile, profile.file.parent
        self.runs = {run.key: run for run in (*profile.runs(), *profile.sweep_runs())}
        self.keys = {f"{run.task}-{run.size}-{run.seed}": run.key for run in profile.sweep_runs()}  # as their notebooks are called
        self.console, self.lock = console or Console(highlight=False, soft_wrap=True), threading.Lock()
        self.begun, self.running, self.starts, self.trained = time.monotonic(), None, {}, set()
        self.made, self.skipped, self.due, self.expected = [], [], set(self.runs), self._expected()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.bars = Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.whole, self.jobs = self.bars.add_task(profile.profile, total=len(self.runs), left=""), {}

    def __enter__(self):
        self.bars.start()
        self.say(f"{len(self.runs)} runs of profile {self.profile.profile}; what their stages print is in {self._relative('runs/logs')}")
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def say(self, text):
        "A plain line above the bars."
        self.console.print(text, markup=False)

    def watch(self, name, stream, log):
        "Read what a job prints until it ends, in a thread; the thread."
        if name not in self.jobs:
            self.jobs[name] = self.bars.add_task(name, total=None, left="")
        thread = threading.Thread(target=self._read, args=(name, stream, Path(log)), daemon=True)
        thread.start()
        return thread

    def _read(self, name, stream, log):
        with open(log, "ab") as file, stream:
            rest = b""
            while part := stream.read(65536):
                file.write(part)
                file.flush()
                *lines, rest = re.split(rb"[\r\n]", rest + part)
                for line in (*lines, rest if STEP.search(rest.decode(errors="replace")) else b""):
                    with self.lock:
                        self._line(name, line.decode(errors="replace"))
        self.bars.update(self.jobs[name], visible=False)

    def _line(self, name, line):
        "Understand one line of a job."
        job = self.jobs[name]
        if found := BEGIN.search(line):
            task, stage, rest = found.groups()
            if stage.startswith(("train", *LAST)):
                self.running = self.running or time.monotonic()
                self.starts.setdefault(name, time.monotonic())
            if stage.startswith("train"):
                self.trained.add(f"{task}-{rest}")
            self.bars.update(job, description=" ".join(filter(None, (stage, task, rest))), completed=0, total=None, visible=True)
        elif found := SKIP.search(line):
            task, stage, rest = found.groups()
            key = self.keys.get(rest) if stage == "sweep" else f"{task}-{rest}"
            if key in self.trained and stage.startswith("evaluate"):  # trained to the same bits: the score stands
                self._finished(name, key)
            elif key in self.due and stage.startswith(LAST):
                self.skipped.append(key)
                self.due.discard(key)
                self.bars.update(self.whole, completed=len(self.made) + len(self.skipped))
        elif found := DONE.search(line):
            self._finished(name, self.keys.get(found[3], found[3]))
        elif TRIAL.search(line):
            self.say(line)
        elif found := FAIL.search(line):
            self.say(f"{name}: {found[1]} (see {self._relative(f'runs/logs/{name}.log')})")
        elif found := STEP.search(line):
            self.bars.update(job, completed=int(found[1]), total=int(found[2]))

    def _finished(self, name, key):
        "Say what a run has found."
        record = self.folder / "results" / "scores" / f"{key}.json"
        if key not in self.due or not record.exists():
            return
        self.made.append(key)
        self.due.discard(key)
        now, values = time.monotonic(), json.loads(record.read_text())
        took, number = now - self.starts.pop(name, now), len(self.made) + len(self.skipped)
        left = f"{duration(self._left(now))} left"
        size = f" {self.runs[key].size}" if self.runs[key].size else ""
        text = f"{values['method']} {values['task']}{size} {values['score']:.1f} (majority {values['majority_score']:.1f}) {took:.0f} s"
        self.bars.update(self.whole, completed=number, left=left)
        self.say(f"[{number}/{len(self.runs)}] {text}, {left}")

    def _expected(self):
        "How long each run may take beside the others, in seconds: what its training once took, and something for the rest."
        file = self.folder / "results" / "costs.csv"
        rows = csv.DictReader(file.read_text().splitlines()) if file.exists() else ()
        known = {"-".join(filter(None, (r["task"], r["method"], r["seed"], r["size"]))): float(r["train_seconds"] or 0) for r in rows}
        return {key: AROUND + known.get(key, 0.0) for key in self.runs}

    def _left(self, now):
        "Seconds that the rest will take, if it goes on as it went so far."
        made, due = (sum(self.expected[key] for key in keys) for keys in (self.made, self.due))
        return (now - (self.running or now)) * due / made

    def conclude(self, status):
        "The last lines: what was done, how it compares with what is in git, and where to look."
        took = duration(time.monotonic() - self.begun)
        if status:
            self.say(f"not everything is up to date after {took}; what went wrong is above and in {self._relative('runs/logs')}. The same command goes on from here")
            return
        self.say(f"{len(self.made)} runs made and {len(self.skipped)} found up to date in {took}")
        equal, known = self.committed()
        if known:
            self.say(f"{equal} of {known} committed scores found again{'' if equal == known else '; another processor adds in another order'}")
        self.say(f"look at {self._relative('results/report/report.html')}")

    def _relative(self, path):
        "A path below the profile's folder, seen from the working folder."
        return os.path.relpath(self.folder / path)

    def committed(self):
        "How many scores equal those of the last commit, and how many there are to compare with."
        equal = known = 0
        for key in self.runs:
            file = self.folder / "results" / "scores" / f"{key}.json"
            old = subprocess.run(["git", "show", f"HEAD:./results/scores/{key}.json"], cwd=self.folder, capture_output=True)
            if old.returncode == 0 and file.exists():
                known += 1
                equal += json.loads(old.stdout)["score"] == json.loads(file.read_text())["score"]
        return equal, known
