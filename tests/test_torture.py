"""The checks of `make torture` can fail, and its page says what its last result says. The campaign itself takes minutes: `make torture`."""

import json
import subprocess
import sys
import time

import pytest
import yaml

import forks
from tests import aftermath, grids, torture
from tests.letters import wait_until

TRAIN, REPORT = "tasks/cb/dvc.yaml:train@pt-0", "report"


@pytest.fixture
def grid(tmp_path):
    """Results as a grid leaves them, in few files."""
    root = tmp_path / "grid"
    files = {"runs/adapters/cb-pt-0/adapter_model.safetensors": "weights", "results/scores/cb-pt-0.json": "{}", "results/predictions/cb-pt-0.csv": "1\n"}
    entry = {"cmd": "python run.py", "outs": [{"path": "results/scores/cb-pt-0.json", "md5": "a"}, {"path": "runs/costs/cb-pt-0.json", "md5": "b"}]}
    files |= {"dvc.lock": yaml.safe_dump({"schema": "2.0", "stages": {"report": entry}}), "runs/costs/cb-pt-0.json": "1.5\n", "runs/logs/report.log": "report: 1.2 s, see it\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "tmp").mkdir()
    return root


def after(root, change):
    """What differs after a change."""
    expected = aftermath.results(root)
    change()
    return aftermath.differences(expected, aftermath.results(root))


# ---- results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs/adapters/cb-pt-0/adapter_model.safetensors", "results/scores/cb-pt-0.json", "results/predictions/cb-pt-0.csv"])
def test_a_result_that_was_tampered_with_is_named(grid, name):
    assert after(grid, lambda: (grid / name).write_text("other")) == [f"{name} is not what an undisturbed run makes"]
    assert after(grid, (grid / name).unlink) == [f"{name} is missing"]


def test_what_no_undisturbed_run_makes_is_named(grid):
    assert after(grid, lambda: (grid / "results" / "scores" / "more.json").write_text("")) == ["results/scores/more.json is made by no undisturbed run"]


def test_another_record_in_a_lock_is_named_but_not_what_differs_each_time(grid):
    lock = grid / "dvc.lock"
    assert after(grid, lambda: lock.write_text(lock.read_text().replace("md5: b", "md5: c"))) == []
    assert after(grid, lambda: lock.write_text(lock.read_text().replace("md5: a", "md5: c"))) == ["dvc.lock:report is not what an undisturbed run makes"]
    assert after(grid, lambda: (grid / "runs" / "costs" / "cb-pt-0.json").write_text("2.5\n")) == []


def test_a_lock_that_was_cut_is_noticed_wherever_that_was(grid):
    """In the middle of a line at once; between two, by what is missing in the end."""
    lock, expected, seen = grid / "dvc.lock", aftermath.results(grid), 0
    whole = lock.read_bytes()
    for size in range(len(whole)):
        lock.write_bytes(whole[:size])
        if cut := torture.cut_locks(grid):
            seen += f"is cut: {size} bytes" in cut[0]
        else:
            assert whole[:size].endswith(b"\n") and aftermath.differences(expected, aftermath.results(grid))
    assert seen > len(whole) - len(whole.splitlines())
    lock.write_bytes(whole)
    assert not torture.cut_locks(grid)


# ---- journal ------------------------------------------------------------------------------------------------------------


def journal(*lines):
    return [f"2026-01-01T00:00:00 {line}" for line in lines]


def test_a_stage_that_ran_to_its_end_twice_is_named():
    once = journal(f"begins {TRAIN}", f"ended {TRAIN}")
    assert aftermath.repeated(once, {TRAIN: 1}) == []
    assert f"{TRAIN} began anew after its end was recorded" in aftermath.repeated(once + once, {TRAIN: 1})
    assert aftermath.repeated(once, {TRAIN: 2}) == [f"{TRAIN} was at its end 2 times, and 0 kills explain that"]


@pytest.mark.parametrize("victim, explained", [("coordinator", True), ("worker", True), ("fork server", True), ("job", True), ("stage", False)])
def test_only_who_holds_what_a_stage_has_done_explains_that_it_did_it_twice(victim, explained):
    lines = journal(f"begins {TRAIN}", f"killed {victim}", f"begins {TRAIN}", f"ended {TRAIN}")
    assert bool(aftermath.repeated(lines, {TRAIN: 2})) != explained
    assert aftermath.repeated(lines, {TRAIN: 3}), "one kill explains one more"
    elsewhere = journal(f"begins {TRAIN}", f"ended {TRAIN}", f"killed {victim}", f"begins {REPORT}", f"ended {REPORT}")
    assert aftermath.repeated(elsewhere, {TRAIN: 2}), "a kill after the record explains nothing"


def test_a_failure_of_its_own_is_told():
    killed, own = f"failed {TRAIN}: ended by signal 9 on n1", f"failed {REPORT}: exit status 1 on n1: KeyError"
    assert aftermath.strange_failures(journal(killed, own), "signal 9") == [own]


# ---- leftovers ----------------------------------------------------------------------------------------------------------


def test_what_is_left_over_is_named(grid, tmp_path):
    expected, scratch = aftermath.names(grid), tmp_path / "tmp"
    assert aftermath.left_over(grid, expected, scratch) == []
    (grid / "results" / "scores" / ".cb.json.x7").write_text("")
    (scratch / "pymp-1").mkdir()
    (grid / ".dvc" / "tmp").mkdir(parents=True)
    (grid / ".dvc" / "tmp" / "rwlock").write_text(json.dumps({"write": {"runs/backbone": {"pid": 1, "cmd": "repro"}}, "read": {}}))
    assert aftermath.left_over(grid, expected, scratch) == ["runs/backbone is still held to write", "results/scores/.cb.json.x7 was left", "tmp/pymp-1 was left"]


def test_a_process_that_lives_on_is_named(grid, tmp_path):
    process = subprocess.Popen(["sleep", "60"], cwd=grid)
    try:
        wait_until(lambda: aftermath.left_over(grid, aftermath.names(grid), tmp_path / "tmp"))
        assert aftermath.left_over(grid, aftermath.names(grid), tmp_path / "tmp") == [f"process {process.pid} (sleep 60) lives on"]
    finally:
        process.kill()
        process.wait()


# ---- kills --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "part", "in place"])
def test_a_timed_kill_hits_the_write_of_the_lock(tmp_path, kind):
    """Here a program that writes a lock as DVC does, or as we do, and then waits."""
    lock = tmp_path / "dvc.lock"
    lock.write_text("old")
    program = tmp_path / "program.py"
    ours = f"handle, name = tempfile.mkstemp(prefix='part-', dir={str(tmp_path)!r}); os.replace(name, {str(lock)!r})"
    write = f"f = open({str(lock)!r}, 'w'); f.write('new')" if kind == "in place" else ours
    program.write_text(f"import os, tempfile, time\n{write}\ntime.sleep(60)\n")
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", torture.TIMED, kind, "1", "0.01", program]).returncode == -9
    assert time.monotonic() - start < 50, "it did not wait to its end"
    assert lock.read_text() == "" if kind == "in place" else lock.read_text() in ("old", "")


def test_every_stage_has_a_kind():
    logs = {"plan": "plan", "search-transfer@spot": "search", "search-like@mpt": "search", "tasks-cola-train-transfer@mpt-0": "train", "tasks-cb-prepare": "prepare"}
    assert {log: grids.kind_of(log) for log in logs} == logs


def test_the_command_begins_without_pytest():
    assert "--kills" in forks.run("-m", "tests.torture", "--help", cwd=torture.ROOT).stdout


# ---- the last result ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_last_campaign_found():
    result = json.loads(torture.RESULT.read_text())
    assert torture.show(result) in torture.PAGE.read_text(), "run: make torture"
    assert result["parts"].keys() == torture.PARTS.keys() and not any(part["problems"] for part in result["parts"].values())
    assert torture.counts_of(result)[0].total() >= 200
    hit = {kind for part in result["parts"].values() for counts in part.get("kills", {}).values() for kind in counts}
    assert hit >= set(grids.KINDS), "kills at stages of every kind"
