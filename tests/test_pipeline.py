"""The pipeline: what DVC runs again and what it leaves alone, killed runs, the runner's answers to mistakes.

A miniature of the repository is made in a temporary folder: the real dvc.yaml, notebooks and modules; two tasks, two methods, two
to forty steps. Only the backbone is a stand-in, a tiny T5 with random weights: training one has tests of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "results", "data", "cache", "tmp", "__pycache__", ".ipynb_checkpoints", "dvc.lock", "*.egg-info")

TINY_BACKBONE = '''
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PretrainingConfig:
    seed: int = 0


def pretrain(config, folder, **_):
    from tests.conftest import byte_tokenizer, tiny_t5

    tiny_t5().save_pretrained(folder)
    byte_tokenizer(eos=True).save_pretrained(folder)
    (Path(folder) / "backbone.json").write_text(json.dumps({"name": "embedded", "revision": None}))
'''

PARAMETERS = {
    "profile": "embedded", "root": ".", "here": "",
    "backbone": {"name": "embedded"},
    "data": {"source": "embedded", "depends": "data", "subsample": {"validation": 16, "test": 24}},
    "grid": {"methods": ["pt", "ept"], "seeds": [0], "transfer": [], "sources": []},
    "search": {"factors": [1], "steps": 2, "seed": 0},
    "sweep": {"tasks": [], "seeds": [], "sizes": []},
    "training": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "prompt_length": 60, "short_length": 8, "max_length": 96},
    "methods": {"pt": {}, "ept": {}},
}  # fmt: skip


TASKS = ("cola", "cb")


class Clone:
    """A miniature of the repository, and the commands that are given in it."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(ROOT, root, symlinks=True, ignore=LEFT_OUT)
        (root / "ept" / "pretraining.py").write_text(TINY_BACKBONE)
        for folder in set((root / "tasks").iterdir()) - {root / "tasks" / name for name in (*TASKS, "pipeline.yaml")}:
            shutil.rmtree(folder)
        self.write(PARAMETERS)
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        for profile in (root / "profiles").iterdir():
            assert (profile / "dvc.yaml").is_symlink()
            shutil.rmtree(profile / "tasks")

    def write(self, parameters):
        (self.root / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))

    def environment(self):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("EPT_")}
        return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def call(self, *command, fails=False):
        done = subprocess.run([sys.executable, *command], cwd=self.root, env=self.environment(), capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def run(self, *arguments, **options):
        return self.call("nbs/pipelines/run.py", *arguments, **options)

    def reproduce(self, jobs=2):
        """Stages that `make reproduce` has run."""
        return sorted(set(self.order(jobs)))

    def order(self, jobs=2):
        """The same, in the order in which they have begun; twice, what was run twice."""
        text = self.call("nbs/pipelines/reproduce.py", "--jobs", str(jobs))
        return [stage.removeprefix("tasks/").replace("/dvc.yaml:", ":").removeprefix("dvc.yaml:") for stage in re.findall(r"Running stage '([^']+)'", text)]

    def files(self, folder):
        base = self.root / folder
        return {str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}


# ---- mistakes, answered by the runner -----------------------------------------------------------------------------------


def ask(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "EPT_WARM"}
    return subprocess.run([sys.executable, "nbs/pipelines/run.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown stage 'trian'; did you mean 'train'?"),
        (["train", "--tsk", "cb"], "unknown parameter '--tsk'; did you mean '--task'?"),
        (["train", "--task"], "--task has no value"),
        (["train", "--profile-file", "profiles/smolm2/params.yaml"], "no parameter file 'profiles/smolm2/params.yaml'; there are: params.yaml, "),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message):
    done = ask(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_help_lists_every_stage_and_parameter():
    done = ask("--help")
    assert done.returncode == 0
    for word in ("prepare:", "backbone:", "search:", "source:", "train:", "evaluate:", "report:", "--profile-file", "--task", "--method", "--seed"):
        assert word in done.stdout


def test_unknown_profile_is_named():
    done = subprocess.run([sys.executable, "nbs/pipelines/reproduce.py", "--profile", "smolm2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean 'smollm2'?" in done.stderr


# ---- the miniature ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A miniature whose whole grid has been run, from `dvc pull` to the report."""
    clone = Clone(tmp_path_factory.mktemp("pipeline") / "clone")
    clone.pulled = clone.call("-m", "dvc", "pull"), len(clone.files("data"))
    shutil.rmtree(clone.root / "data")
    clone.first = clone.reproduce()
    return clone


KEYS = [f"{t}-{m}-0" for t in ("cb", "cola") for m in ("ept", "pt")]


@pytest.mark.slow
def test_dvc_pull_brings_the_data_and_misses_nothing(clone):
    output, files = clone.pulled
    listed = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]["nfiles"]
    assert files == listed and "WARNING" not in output and "ERROR" not in output


@pytest.mark.slow
def test_one_command_makes_everything(clone):
    runs = [f"{t}:{s}" for t in TASKS for m in ("pt", "ept") for s in (f"search@{m}", f"train@{m}-0", f"evaluate@{m}-0")]
    assert clone.first == sorted(["backbone", "report", *(f"{t}:prepare" for t in TASKS), *runs])
    assert (clone.root / "data" / "glue").is_dir(), "dvc pull has brought the data from the remote inside the repository"
    for key in KEYS:
        record = json.loads((clone.root / f"results/embedded/scores/{key}.json").read_text())
        assert f"{record['task']}-{record['method']}-{record['seed']}" == key and record["n"] == 24
        assert {"backbone", "config", "score", "majority_score", "trainable_parameters", "chosen_step", "packages", "code"} <= set(record)
        assert all(metric["n"] for metric in record["metrics"].values())
        assert record["config"]["search"] == {"factor": 1.0, "factors": [1.0]}
        found = json.loads((clone.root / f"results/embedded/search/{record['task']}-{record['method']}.json").read_text())
        assert (found["factor"], found["tried"], found["steps"]) == (1.0, [], 0), "one factor: nothing is tried"
        cost = json.loads((clone.root / f"results/embedded/costs/{key}.json").read_text())
        assert {"train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes", "device", "precision"} <= set(cost)
    report = clone.files("results/embedded/report")
    assert {"report.html", "report.ipynb", "table.md", "table.csv", "figures/scores.svg", "figures/curves.svg", "figures/gates.svg", "figures/time.svg"} <= set(report)
    assert b"says nothing about English" in report["report.html"] and b"says nothing about English" in report["table.md"]
    written = [f for f in clone.files("results") if f.endswith((".json", ".csv", ".html", ".ipynb"))]
    assert not [f for f in written if str(clone.root).encode() in clone.files("results")[f]], "no path of this machine in a result"
    assert not any((clone.root / "runs/embedded/checkpoints").iterdir())


@pytest.mark.slow
def test_a_second_time_runs_nothing(clone):
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_a_change_of_the_report_runs_the_report_alone(clone):
    before = clone.files("results/embedded/scores")
    for module in ("results", "figures"):
        with open(clone.root / "ept" / f"{module}.py", "a") as file:
            file.write("\n# touched\n")
        assert clone.reproduce(jobs=1) == ["report"]
    assert clone.files("results/embedded/scores") == before


@pytest.mark.slow
def test_one_learning_rate_of_one_task_runs_that_task_alone(clone):
    before = clone.files("results/embedded/scores")
    (clone.root / "tasks" / "cb" / "params.yaml").write_text("task: cb\noverrides: {learning_rate: 0.1}\n")
    ran = clone.reproduce()
    assert ran == sorted([*(f"cb:{s}" for m in ("pt", "ept") for s in (f"search@{m}", f"train@{m}-0", f"evaluate@{m}-0")), "report"])
    after = clone.files("results/embedded/scores")
    assert all(after[f"{key}.json"] == before[f"{key}.json"] for key in KEYS if key.startswith("cola"))
    assert json.loads(after["cb-pt-0.json"])["config"]["training"]["learning_rate"] == 0.1
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_settings_change_nothing(clone):
    """Nothing in settings.ini is part of a result's identity."""
    with open(clone.root / "settings.ini", "a") as file:
        file.write("\n# touched\n")
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_a_sweep_runs_beside_the_grid(clone):
    grid = clone.files("results/embedded/scores")
    clone.write({**PARAMETERS, "sweep": {"tasks": ["cb"], "seeds": [0], "sizes": ["rank-1", "short_length-4"]}})
    assert clone.reproduce() == ["report", "sweep@cb-rank-1-0", "sweep@cb-short_length-4-0"]
    after = clone.files("results/embedded/scores")
    assert {name: after[name] for name in grid} == grid, "the grid's own runs are left alone"
    own, rank, short = (json.loads(after[f"cb-ept-0{size}.json"]) for size in ("", "-rank-1", "-short_length-4"))
    sizes = own["config"]["sizes"]
    assert "swept" not in own and rank["swept"] == "rank" and rank["config"]["sizes"] == sizes | {"rank": 1}
    assert short["config"]["sizes"] == sizes | {"short_length": 4, "rank": short["config"]["sizes"]["rank"]} and short["config"]["sizes"]["rank"] > sizes["rank"]
    assert rank["config"]["training"] == short["config"]["training"] == own["config"]["training"]
    assert (clone.root / "results/embedded/report/figures/sweep.svg").exists()
    assert clone.reproduce(jobs=1) == []
    clone.write(PARAMETERS)


# ---- learning rates and sources -----------------------------------------------------------------------------------------

WITH_TRANSFER = {
    **PARAMETERS,
    "grid": {"methods": ["frozen", "pt"], "seeds": [0], "transfer": ["spot"], "sources": ["cola", "cb"]},
    "search": {"factors": [0.5, 1, 2], "steps": 2, "seed": 0},
    "methods": {"frozen": {}, "pt": {}, "spot": {}},
}  # fmt: skip


def search(clone, key):
    return json.loads((clone.root / f"results/embedded/search/{key}.json").read_text())


@pytest.fixture(scope="module")
def transfers(clone):
    """The stages of a grid with a search and with a method that starts from other tasks, in their order."""
    clone.write(WITH_TRANSFER)
    yield clone.order()
    clone.write(PARAMETERS)


@pytest.mark.slow
def test_sources_are_trained_once_and_first(clone, transfers):
    assert len(transfers) == len(set(transfers)), "nothing is run twice"
    kept, starts = {f"source@{t}-0" for t in TASKS}, {f"{t}:search-transfer@spot" for t in TASKS}
    assert kept | starts | {f"{t}:{s}-transfer@spot-0" for t in TASKS for s in ("train", "evaluate")} <= set(transfers)
    at = transfers.index
    assert max(at(s) for s in kept) < min(at(s) for s in starts)
    for task in TASKS:
        assert f"{task}:train@pt-0" not in transfers or at(f"{task}:train@pt-0") < at(f"source@{task}-0")
        assert at(f"{task}:search-transfer@spot") < at(f"{task}:train-transfer@spot-0")
    for task, other in (TASKS, TASKS[::-1]):
        record = json.loads((clone.root / f"results/embedded/scores/{task}-spot-0.json").read_text())
        assert list(record["config"]["source_prompts"]) == [other]
        kept = clone.files(f"runs/embedded/sources/0/{other}")
        assert set(kept) == {"adapter_config.json", "adapter_model.safetensors"}
        assert all(clone.files(f"runs/embedded/adapters/{other}-pt-0")[name] == content for name, content in kept.items())


@pytest.mark.slow
def test_the_search_is_written_down_and_used(clone, transfers):
    for task in TASKS:
        for method in ("pt", "spot"):
            found = search(clone, f"{task}-{method}")
            scores = {t["factor"]: t["validation_score"] for t in found["tried"]}
            assert list(scores) == [0.5, 1.0, 2.0] and scores[found["factor"]] == max(scores.values())
            config = json.loads((clone.root / f"results/embedded/scores/{task}-{method}-0.json").read_text())["config"]
            assert config["search"] == {"factor": found["factor"], "factors": [0.5, 1.0, 2.0]}
            base = 0.1 if task == "cb" else 0.3  # an earlier test has changed cb's
            assert config["training"]["learning_rate"] == base * found["factor"] and config["training"]["steps"] == 4
        assert search(clone, f"{task}-frozen")["tried"] == [], "nothing is trained, so nothing is tried"


@pytest.mark.slow
def test_a_second_time_searches_and_transfers_nothing(clone, transfers):
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("poison", [b"this is no parquet file", None], ids=["poisoned", "missing"])
def test_the_search_does_not_open_the_test_split(clone, transfers, poison):
    test, record = clone.root / "runs/embedded/data/cb/test.parquet", clone.root / "results/embedded/search/cb-pt.json"
    kept, before = test.read_bytes(), record.read_bytes()
    record.unlink()
    try:
        test.unlink() if poison is None else test.write_bytes(poison)
        clone.run("search", "--task", "cb", "--method", "pt")
    finally:
        test.write_bytes(kept)
    assert record.read_bytes() == before


@pytest.mark.slow
def test_a_changed_source_runs_what_starts_from_it(clone, transfers):
    """The rate of one source task: everything on that task, and of the other task only what starts from it."""
    (clone.root / "tasks" / "cb" / "params.yaml").write_text("task: cb\noverrides: {learning_rate: 0.2}\n")
    ran = clone.order()
    on_cola = sorted(stage for stage in set(ran) if stage.startswith("cola:"))
    assert on_cola[-2:] == ["cola:search-transfer@spot", "cola:train-transfer@spot-0"] and set(on_cola[:-2]) <= {"cola:evaluate-transfer@spot-0"}
    assert {"source@cb-0", "cb:search@pt", "cb:train@pt-0", "cb:search-transfer@spot", "cb:train-transfer@spot-0"} <= set(ran)
    assert "source@cola-0" not in ran and ran.index("source@cb-0") < ran.index("cola:train-transfer@spot-0")
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_a_transfer_in_the_wrong_list_stops_before_anything_trains(clone, transfers):
    clone.write({**WITH_TRANSFER, "grid": {"methods": ["pt", "spot"], "seeds": [0], "transfer": [], "sources": []}})
    answer = clone.run("train", "--task", "cb", "--method", "spot", fails=True)
    assert "method 'spot' starts from prompts of other tasks; list it in grid.transfer" in answer
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
def test_training_without_a_search_says_what_to_do(clone, transfers):
    clone.write({**WITH_TRANSFER, "methods": {**WITH_TRANSFER["methods"], "bitfit": {}}})
    assert "run the search stage of cb-bitfit first" in clone.run("train", "--task", "cb", "--method", "bitfit", fails=True)
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
def test_wrong_parameters_stop_before_anything_trains(clone):
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "learning_rat": 0.1}})
    before = clone.files("runs/embedded/adapters")
    assert "did you mean 'learning_rate'?" in clone.run("train", "--task", "cb", "--method", "pt", fails=True)
    assert clone.files("runs/embedded/adapters") == before
    assert "error" in (clone.root / "runs/embedded/notebooks/train-cb-pt-0.ipynb").read_text()
    clone.write(PARAMETERS)


# ---- killed runs --------------------------------------------------------------------------------------------------------


def kill_in_training(clone, key, step, command):
    """Start a command, kill everything it has started once a checkpoint of `step` is whole; the checkpoints that are left."""
    process = subprocess.Popen([sys.executable, *command], cwd=clone.root, env=clone.environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = clone.root / "runs" / "embedded" / "checkpoints" / key
    deadline = time.monotonic() + 180
    while not list(folder.glob(f"checkpoint-{step}/whole.json")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return sorted(p.name for p in folder.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pt", "ept"])
def test_a_killed_run_ends_with_the_same_bits(clone, method):
    """SIGKILL in the middle of training, under DVC; the next `dvc repro` finishes, adapter and metrics as if nothing had been."""
    key = f"cola-{method}-0"
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 60, "evaluate_every": 3}})
    repro = ["-m", "dvc", "repro", "--single-item", *(f"tasks/cola/dvc.yaml:{stage}@{method}-0" for stage in ("train", "evaluate"))]
    adapter, scores = f"runs/embedded/adapters/{key}", clone.root / f"results/embedded/scores/{key}.json"

    clone.call(*repro)
    undisturbed = clone.files(adapter), scores.read_bytes()
    shutil.rmtree(clone.root / adapter)
    (clone.root / "tasks" / "cola" / "dvc.lock").unlink()

    left = kill_in_training(clone, key, 9, repro)
    assert left and not (clone.root / adapter / "adapter_config.json").exists()
    assert max(int(name.split("-")[1]) for name in left) < 60, "killed too late to prove anything"
    text = clone.call(*repro)
    assert re.search(r"\|\s*(9|1\d|2\d|3\d|4\d|5\d)/60", text) and not re.search(r"\|\s*[0-8]/60", text), "it went on from the checkpoint"
    assert (clone.files(adapter), scores.read_bytes()) == undisturbed
    clone.write(PARAMETERS)


@pytest.mark.slow
def test_a_warm_worker_dies_with_the_stage_that_asked_for_it(clone):
    """Killing what DVC has started must leave nothing behind that still writes."""
    key = "cb-ept-0"
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 4000, "evaluate_every": 2}})
    address = str(clone.root / "warm")
    server = subprocess.Popen([sys.executable, "nbs/pipelines/warm.py", address], cwd=clone.root, env=clone.environment(), stdin=subprocess.PIPE)
    try:
        while not os.path.exists(address):
            time.sleep(0.05)
        environment = {**clone.environment(), "EPT_WARM": address}
        command = [sys.executable, "nbs/pipelines/run.py", "train", "--task", "cb", "--method", "ept"]
        stage = subprocess.Popen(command, cwd=clone.root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder = clone.root / "runs/embedded/checkpoints" / key
        while not list(folder.glob("checkpoint-*/whole.json")):
            assert stage.poll() is None
            time.sleep(0.05)
        stage.kill()
        stage.wait()
        time.sleep(1.0)
        seen = sorted(p.name for p in folder.glob("checkpoint-*"))
        time.sleep(1.5)
        assert sorted(p.name for p in folder.glob("checkpoint-*")) == seen
    finally:
        server.stdin.close()
        assert server.wait(timeout=30) == 0
    shutil.rmtree(folder)
    clone.write(PARAMETERS)
