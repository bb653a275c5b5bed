"""What a person sees while a grid runs, made from what DVC and the stages print."""

import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from ept.grid.profiles import load_profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nbs" / "pipelines"))
from progress import Progress, duration

sys.path.pop(0)

PARAMETERS = """
profile: small
backbone: {name: embedded, folder: backbone}
data: {source: embedded, folder: data}
grid: {references: [frozen], methods: [ept], seeds: [0]}
sweep: {tasks: [cb], seeds: [0], sizes: [rank-1]}
methods: {ept: {}, frozen: {}}
tasks: {cb: {}, rte: {}}
"""
TRAINED = (
    "Running stage 'tasks/rte/dvc.yaml:train@ept-0':\n> python nbs/pipelines/run.py train --task rte --method ept --seed 0\n"
    "\rept on rte:   0%|          | 0/60 [00:00<?, ?step/s]\rept on rte:  50%|#####     | 30/60 [00:01<00:01, 20step/s, loss=0.1]"
)
EVALUATED = "\nRunning stage 'tasks/rte/dvc.yaml:evaluate@ept-0':\nevaluate rte ept 0: 1.2 s, see runs/notebooks/evaluate-rte-ept-0.ipynb\n"


@pytest.fixture
def watch(tmp_path):
    """What is shown for what a job prints."""
    (tmp_path / "params.yaml").write_text(PARAMETERS)
    profile, scores = load_profile(tmp_path / "params.yaml"), tmp_path / "results" / "scores"
    scores.mkdir(parents=True)
    for run in (*profile.runs(), *profile.sweep_runs()):
        record = {"task": run.task, "method": run.method, "score": 74.04, "majority_score": 47.0}
        (scores / f"{run.key}.json").write_text(json.dumps(record))

    def show(printed, terminal=False, log=tmp_path / "runs-1.log"):
        shown, ended = io.StringIO(), threading.Event()

        class Job(io.BytesIO):
            def read(self, size):
                return super().read(size) or (b"" if ended.wait() else None)  # it goes on until it is told to end

        with Progress(profile, Console(file=shown, force_terminal=terminal, width=100, highlight=False, soft_wrap=True)) as progress:
            job, deadline = progress.watch("runs-1", Job(printed.encode()), log), time.monotonic() + 10
            while not log.exists() or log.stat().st_size < len(printed.encode()) or progress.lock.locked():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.05)
            progress.bars.refresh()
            ended.set()
            job.join()
            state = len(progress.made), len(progress.skipped)
        head, _, rest = shown.getvalue().partition("runs/logs\n")
        assert "5 runs of profile small" in head
        return rest or head, state, log.read_bytes()

    return show


def test_a_finished_run_is_one_line(watch):
    shown, state, log = watch(TRAINED + EVALUATED)
    assert re.fullmatch(r"\[1/5\] ept rte 74\.0 \(majority 47\.0\) \d+ s, \d+:\d\d left\n", shown) and state == (1, 0)
    assert log.decode() == TRAINED + EVALUATED, "the log has all that the job has printed"


def test_a_run_that_is_trained_to_the_same_bits_is_a_line_too(watch):
    shown, state, _ = watch(TRAINED + "\nStage 'tasks/rte/dvc.yaml:evaluate@ept-0' didn't change, skipping\n")
    assert shown.startswith("[1/5] ept rte 74.0") and state == (1, 0)


def test_what_is_up_to_date_is_counted_and_not_told(watch):
    skips = "".join(
        f"Stage '{stage}' didn't change, skipping\n"
        for stage in (
            "plan",
            "backbone",
            "tasks/rte/dvc.yaml:prepare",
            "tasks/rte/dvc.yaml:train@ept-0",
            "tasks/rte/dvc.yaml:evaluate@ept-0",
            "tasks/cb/dvc.yaml:reference@frozen-0",
            "tasks/cb/dvc.yaml:evaluate-transfer@ept-0",
            "sweep@cb-rank-1-0",
            "report",
        )
    )
    said, state, _ = watch(skips)
    assert "[" not in said and state == (0, 4)


def test_a_run_of_the_sweep_says_which_size(watch):
    shown, _, _ = watch("Running stage 'sweep@cb-rank-1-0':\nsweep cb rank-1 0: 3.0 s, see runs/notebooks/sweep-cb-rank-1-0.ipynb\n")
    assert shown.startswith("[1/5] ept cb rank-1 74.0 (majority 47.0)")


def test_an_error_is_told_with_the_place_of_its_log(watch):
    shown, _, _ = watch("error: unknown method 'epd'; did you mean 'ept'?\nERROR: failed to reproduce 'plan': it failed\n")
    assert "unknown method 'epd'; did you mean 'ept'?" in shown and "runs/logs/runs-1.log" in shown


def test_a_terminal_shows_the_whole_and_each_job(watch):
    shown, _, _ = watch(TRAINED, terminal=True)
    assert "small" in shown and "0/5" in shown and "train rte ept-0" in shown and "30/60" in shown
    assert "step/s" not in shown, "the jobs' own bars are in their logs"


def test_the_time_left_knows_what_runs_took_before(watch, tmp_path):
    """A long run that is left counts for more than a short one that is done."""
    table = tmp_path / "results" / "costs.csv"
    table.parent.mkdir(exist_ok=True)
    table.write_text("task,method,seed,size,train_seconds\nrte,ept,0,,8\ncb,ept,0,,98\ncb,ept,0,rank-1,\n")
    profile = load_profile(tmp_path / "params.yaml")
    progress = Progress(profile, Console(file=io.StringIO()))
    progress.running, progress.made = 1.0, ["rte-ept-0"]
    progress.due.discard("rte-ept-0")
    assert progress._left(11.0) == pytest.approx(10 * (100 + 3 * 2) / 10)


def test_duration_is_that_of_a_clock():
    assert [duration(s) for s in (0, 59.6, 61, 600)] == ["0:00", "0:59", "1:01", "10:00"]
