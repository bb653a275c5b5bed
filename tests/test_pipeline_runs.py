"""Runs of the pipeline: searches, sources, sweeps beside them; runs that are killed and go on.

All of it in a miniature of the repository, see miniature.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pytest

from tests.letters import below
from tests.miniature import PARAMETERS, TASKS, Clone

# ---- learning rates and sources -----------------------------------------------------------------------------------------

WITH_TRANSFER = {
    **PARAMETERS,
    "grid": {"references": ["frozen"], "methods": ["pt"], "seeds": [0], "transfer": ["spot", "mpt"], "sources": ["cola", "cb"]},
    "sources": {"steps": 6, "shared_steps": 8},
    "search": {"tasks": ["cb"], "seeds": [7], "trials": 2, "steps": 2, "rates": {"learning_rate": [0.01, 3]}, "like": {"mpt": "spot"}},
    "methods": {"frozen": {}, "pt": {}, "spot": {}},
}


def search(clone, key):
    return json.loads((clone.root / f"results/search/{key}.json").read_text())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A miniature of the repository."""
    return Clone(tmp_path_factory.mktemp("pipeline") / "clone")


@pytest.fixture(scope="module")
def transfers(clone):
    """The stages of a grid with a search and with methods that start from other tasks, in the order in which they were run."""
    clone.write(WITH_TRANSFER)
    return clone.order()


@pytest.mark.slow
def test_sources_are_trained_once_and_first(clone, transfers):
    assert len(transfers) == len(set(transfers)), "nothing is run twice"
    kept, starts = {f"source@{t}-{seed}" for t in TASKS for seed in (0, 7)}, ("search@pt", "search-transfer@spot", "search-like@mpt")
    assert kept | {*starts, "shared@0", "shared@7"} | {f"{t}:{s}-transfer@spot-0" for t in TASKS for s in ("train", "evaluate")} <= set(transfers)
    at = transfers.index
    for seed in (0, 7):
        assert max(at(f"source@{t}-{seed}") for t in TASKS) < at(f"shared@{seed}")
    assert at("shared@7") < at("search-transfer@spot") < at("search-like@mpt")
    for task, (method, search) in product(TASKS, {"train@pt": "search@pt", "train-transfer@spot": "search-transfer@spot", "train-transfer@mpt": "search-like@mpt"}.items()):
        assert max(at(search), at("shared@0")) < at(f"{task}:{method}-0") if "transfer" in method else at(search) < at(f"{task}:{method}-0")
    for task, other in (TASKS, TASKS[::-1]):
        record = json.loads((clone.root / f"results/scores/{task}-spot-0.json").read_text())
        assert list(record["config"]["source_prompts"]) == [other]
        shared = json.loads((clone.root / f"results/scores/{task}-mpt-0.json").read_text())
        assert list(shared["config"]["source_prompts"]) == ["shared"] and shared["trainable_parameters"] == 60 * 32 + 60 + 32


@pytest.mark.slow
def test_source_prompts_are_trained_as_long_as_they_need(clone, transfers):
    """Longer than a run of the grid, and what came of it is written down."""
    run = json.loads((clone.root / "results/scores/cb-pt-0.json").read_text())
    assert run["config"]["training"]["steps"] == 4
    for name, steps, method in (("cola", 6, "pt"), ("cb", 6, "pt"), ("shared", 8, "mpt")):
        record = json.loads((clone.root / f"results/sources/{name}-0.json").read_text())
        assert (record["training"]["steps"], record["method"]) == (steps, method)
        assert [entry["step"] for entry in record["history"]] == list(range(0, steps + 1, 2))
        assert record["validation_score"] == max(entry["score"] for entry in record["history"][1:]), "the start is not kept"
        written = {"adapter_config.json", "adapter_model.safetensors", "training.json", "history.csv"} | ({"task.json"} if method == "pt" else set())
        assert set(clone.files(f"runs/sources/0/{name}")) == written, "what is shared answers no task"
    assert list(record["source_prompts"]) == list(TASKS)
    assert not list((clone.root / "runs/checkpoints").glob("source-*")) and {p.name for p in (clone.root / "runs/sources/0").iterdir()} == {*TASKS, "shared"}


@pytest.mark.slow
def test_the_search_is_written_down_and_used(clone, transfers):
    for method in ("pt", "spot", "mpt"):
        found = search(clone, method)
        assert len(found["trials"]) == 2 and found["trials"][0]["values"] == {"learning_rate": 0.3}
        assert found["trials"][found["best"] - 1]["score"] == max(trial["score"] for trial in found["trials"])
        for task in TASKS:
            config = json.loads((clone.root / f"results/scores/{task}-{method}-0.json").read_text())["config"]
            assert config["search"] == {"from": {"profile": "embedded", "method": "spot" if method == "mpt" else method}, "chosen": found["chosen"]}
            assert config["training"]["learning_rate"] == found["chosen"]["learning_rate"] and config["training"]["steps"] == 4
    assert sorted(clone.files("results/search")) == ["mpt.json", "pt.json", "spot.json"], "where nothing is trained, nothing is tried"
    assert len(re.findall(r"\] search (?:pt|spot|mpt): 2 trials, the best \d+\.\d with learning_rate 0\.\d+", clone.said)) == 3, "a line for each search"


@pytest.mark.slow
def test_a_second_time_searches_and_transfers_nothing(clone, transfers):
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_the_length_of_source_prompts_is_no_parameter_of_the_grids_runs(clone, transfers):
    """What is asked of DVC alone: which stages it would run, were the shared prompt trained longer."""
    clone.write({**WITH_TRANSFER, "sources": {"steps": 6, "shared_steps": 10}})
    due = clone.due()
    assert "shared@0" in due and not any(re.search(r"(search|train|evaluate)@", stage) for stage in due)
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
@pytest.mark.parametrize("poison", [b"this is no parquet file", None], ids=["poisoned", "missing"])
def test_the_search_does_not_open_the_test_split(clone, transfers, poison):
    test, record = clone.root / "runs/data/cb/test.parquet", clone.root / "results/search/pt.json"
    kept, before = test.read_bytes(), record.read_bytes()
    record.unlink()
    shutil.rmtree(clone.root / "runs/search")
    try:
        test.unlink() if poison is None else test.write_bytes(poison)
        clone.run("search", "--method", "pt")
    finally:
        test.write_bytes(kept)
    assert record.read_bytes() == before


@pytest.mark.slow
def test_a_changed_source_runs_what_starts_from_it(clone, transfers):
    """The rate of one source task: everything on that task, what all share, and of the other task only what starts from them."""
    clone.write({**WITH_TRANSFER, "tasks": {"cola": {}, "cb": {"learning_rate": 0.2}}})
    ran = clone.order()
    on_cola = sorted(stage for stage in set(ran) if stage.startswith("cola:"))
    starts = {f"cola:train-transfer@{method}-0" for method in ("spot", "mpt")}
    assert starts <= {stage for stage in on_cola if "@pt" not in stage} <= starts | {f"cola:evaluate-transfer@{method}-0" for method in ("spot", "mpt")}
    assert {"source@cb-0", "search@pt", "cb:train@pt-0", "search-transfer@spot", "cb:train-transfer@spot-0"} <= set(ran), "cb is what is searched on"
    assert "source@cola-0" not in ran and ran.index("source@cb-0") < ran.index("shared@0") and ran.index("source@cb-0") < ran.index("cola:train-transfer@spot-0")
    assert clone.reproduce(jobs=1) == []
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
def test_a_transfer_in_the_wrong_list_stops_before_anything_trains(clone, transfers):
    clone.write({**WITH_TRANSFER, "grid": {"methods": ["pt", "spot"], "seeds": [0]}, "search": {}})
    answer = clone.run("train", "--task", "cb", "--method", "spot", fails=True)
    assert "method 'spot' starts from prompts of other tasks; list it in grid.transfer" in answer
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
def test_training_without_a_search_says_what_to_do(clone, transfers):
    clone.write({**WITH_TRANSFER, "methods": {**WITH_TRANSFER["methods"], "bitfit": {}}})
    assert "run the search stage of bitfit first" in clone.run("train", "--task", "cb", "--method", "bitfit", fails=True)
    clone.write(WITH_TRANSFER)


def test_wrong_parameters_stop_before_anything_trains(clone):
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "learning_rat": 0.1}})
    before = clone.files("runs/adapters")
    assert "did you mean 'learning_rate'?" in clone.run("train", "--task", "cb", "--method", "pt", fails=True)
    assert clone.files("runs/adapters") == before
    assert "error" in (clone.root / "runs/notebooks/train-cb-pt-0.ipynb").read_text()
    clone.write(PARAMETERS)


# ---- killed runs --------------------------------------------------------------------------------------------------------


def end_in_training(clone, key, step, command, how=signal.SIGKILL):
    """Start a command, send a signal to everything it has started once a checkpoint of `step` is whole; the checkpoints that are left, the exit status, and what was said."""
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *command], cwd=clone.root, env=clone.environment(), start_new_session=True, **pipe)
    folder = clone.root / "runs" / "checkpoints" / key
    deadline = time.monotonic() + 600
    while not list(folder.glob(f"checkpoint-{step}/whole.json")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, how)
    said = process.communicate(timeout=120)[1]
    return sorted(p.name for p in folder.glob("checkpoint-*")), process.returncode, said


@pytest.mark.parametrize("method", ["ept", pytest.param("pt", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(clone, method):
    """SIGKILL in the middle of training, under DVC; the next `dvc repro` finishes, adapter and metrics as if nothing had been."""
    key = f"cola-{method}-0"
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 60, "evaluate_every": 3}})
    repro = ["-m", "dvc", "repro", "--single-item", *(f"tasks/cola/dvc.yaml:{stage}@{method}-0" for stage in ("train", "evaluate"))]
    adapter, scores = f"runs/adapters/{key}", clone.root / f"results/scores/{key}.json"

    clone.call("nbs/pipelines/reproduce.py", "--fetch")
    clone.dvc("repro", "--single-item", "plan")
    clone.call(*repro)
    undisturbed = clone.files(adapter), scores.read_bytes()
    shutil.rmtree(clone.root / adapter)
    (clone.root / "tasks" / "cola" / "dvc.lock").unlink()

    left = end_in_training(clone, key, 9, repro)[0]
    assert left and not (clone.root / adapter / "adapter_config.json").exists()
    assert max(int(name.split("-")[1]) for name in left) < 60, "killed too late to prove anything"
    text = clone.call(*repro)
    assert re.search(r"\|\s*(9|1\d|2\d|3\d|4\d|5\d)/60", text) and not re.search(r"\|\s*[0-8]/60", text), "it went on from the checkpoint"
    assert (clone.files(adapter), scores.read_bytes()) == undisturbed
    assert not (clone.root / "runs" / "checkpoints" / key).exists(), "they go when the run is recorded"

    train, lock = repro[:-1], clone.root / "tasks" / "cola" / "dvc.lock"
    shutil.rmtree(clone.root / adapter)
    left, status, said = end_in_training(clone, key, 9, ["nbs/pipelines/run.py", "train", "--task", "cola", "--method", method], signal.SIGINT)
    assert (status, said.splitlines()[-1]) == (130, "stopped; the same command goes on from the last checkpoint, or begins anew where there is none") and "Traceback" not in said
    assert left and not below(clone.root), "nothing goes on"
    clone.call(*train)
    before = lock.read_text()
    lock.write_text("")
    assert "dvc.lock was cut off when a command of DVC was killed; mended" in clone.call("nbs/pipelines/mend.py")
    assert "didn't change, skipping" in clone.call(*train)
    lock.unlink()  # as if it was killed before the training was recorded
    assert not re.search(r"\|\s*[0-5]?\d/60", clone.call(*train)) and clone.files(adapter) == undisturbed[0], "not a step is made again"
    lock.write_text(before)
    scores.unlink()
    clone.call(*repro)  # a stage that begins keeps a copy of the lock
    lock.write_text(before[: before.index(f"  evaluate@{method}")])  # DVC does not see that; the stage does
    assert "give the same command again" in clone.call(*repro, fails=True)
    clone.call(*repro)
    assert (clone.files(adapter), scores.read_bytes()) == undisturbed
    clone.write(PARAMETERS)
