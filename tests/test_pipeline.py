"""The pipeline: what DVC runs again and what it leaves alone, killed runs, the runner's answers to mistakes.

A miniature of the repository is made in a temporary folder: the real dvc.yaml, notebooks and modules; two tasks, three methods, two
to forty steps. Only the backbone is a stand-in, a tiny T5 with random weights.
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

from tests.conftest import byte_tokenizer, tiny_t5

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "results", "data", "backbone", "tasks", "profiles", "bench", "cache", "tmp", "__pycache__", ".ipynb_checkpoints", "dvc.lock", "*.egg-info")

PARAMETERS = {
    "profile": "embedded",
    "backbone": {"name": "embedded", "folder": "backbone"},
    "data": {"source": "embedded", "folder": "data", "subsample": {"validation": 16, "test": 24}},
    "grid": {"references": ["frozen"], "methods": ["pt", "ept"], "seeds": [0]},
    "training": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "prompt_length": 60, "short_length": 8, "max_length": 96},
    "methods": {"frozen": {}, "pt": {}, "ept": {}},
    "tasks": {"cola": {}, "cb": {}},
}  # fmt: skip


TASKS = ("cola", "cb")


class Clone:
    """A miniature of the repository, and the commands that are given in it."""

    def __init__(self, root):
        self.root = self.folder = root
        shutil.copytree(ROOT, root, symlinks=True, ignore=LEFT_OUT)
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

    def call(self, *command, folder=None, fails=False):
        done = subprocess.run([sys.executable, *command], cwd=folder or self.root, env=self.environment(), capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def run(self, *arguments, **options):
        return self.call("nbs/pipelines/run.py", *arguments, **options)

    def reproduce(self, jobs=2):
        """Stages that `make reproduce` has run."""
        return sorted(set(self.order(jobs)))

    def order(self, jobs=2):
        """The same, in the order in which they have begun; twice, what was run twice."""
        logs = self.root / "runs" / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        self.said = self.call("nbs/pipelines/reproduce.py", "--jobs", str(jobs))
        rounds = ("plan", "prepare", "sources", "runs", "sweep", "report", "repro")
        return self.stages("".join(log.read_text() for log in sorted(logs.iterdir(), key=lambda p: rounds.index(p.stem.split("-")[0]))))

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
    for word in ("prepare:", "backbone:", "search:", "source:", "train:", "reference:", "evaluate:", "report:", "--profile-file", "--task", "--method", "--seed"):
        assert word in done.stdout


def test_unknown_profile_is_named():
    done = subprocess.run([sys.executable, "nbs/pipelines/reproduce.py", "--profile", "smolm2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean 'smollm2'?" in done.stderr


# ---- the miniature ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A miniature whose whole grid has been run, from `dvc pull` to the report, and committed."""
    clone = Clone(tmp_path_factory.mktemp("pipeline") / "clone")
    clone.first = clone.reproduce()
    clone.git("add", "-A")
    clone.git("commit", "-q", "-m", "a grid")
    shutil.copytree(clone.root / "runs", clone.root.with_name("runs"))
    return clone


KEYS = [f"{t}-{m}-0" for t in ("cb", "cola") for m in ("ept", "pt")]
OF_A_TASK = [f"{stage}@{m}-0" for m in ("pt", "ept") for stage in ("train", "evaluate")]


@pytest.mark.slow
def test_one_command_makes_everything(clone):
    runs = [f"{t}:{s}" for t in TASKS for s in (*OF_A_TASK, "reference@frozen-0", "prepare")]
    assert clone.first == sorted(["plan", "backbone", "report", *runs]), "no search where there is nothing to try"
    listed = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]["nfiles"]
    assert len(clone.files("data")) == listed, "dvc pull has brought the data from the remote inside the repository"
    for key in (*KEYS, "cb-frozen-0"):
        record = json.loads((clone.root / f"results/scores/{key}.json").read_text())
        assert f"{record['task']}-{record['method']}-{record['seed']}" == key and record["n"] == 24
        assert {"backbone", "config", "score", "majority_score", "trainable_parameters", "chosen_step", "packages", "code"} <= set(record)
        assert all(metric["n"] for metric in record["metrics"].values()) and record["backbone"]["fingerprint"]
        assert "search" not in record["config"]
    assert record["config"] == {"max_length": 96, "verbalizer": "words"}, "of a reference only the text matters"
    cost = json.loads((clone.root / f"runs/costs/{KEYS[0]}.json").read_text())
    assert {"train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes", "device", "precision", "work"} <= set(cost)
    report = clone.files("results/report")
    assert {"report.html", "report.ipynb", "table.md", "table.csv", "figures/scores.svg", "figures/curves.svg", "figures/gates.svg", "figures/time.svg"} <= set(report)
    assert b"says nothing about English" in report["report.html"] and b"says nothing about English" in report["table.md"]
    results = clone.files("results")
    assert not [f for f in results if str(clone.root).encode() in results[f]], "no path of this machine in a result"
    assert not any((clone.root / "runs/checkpoints").iterdir())


@pytest.mark.slow
def test_a_line_for_each_finished_run_and_no_bars_without_a_terminal(clone):
    lines = clone.said.splitlines()
    found = [re.fullmatch(r"\[(\d)/6\] (frozen|pt|ept) (cola|cb) -?\d+\.\d \(majority -?\d+\.\d\) \d+ s, \d+:\d\d left", line) for line in lines]
    assert sorted(m[1] for m in found if m) == list("123456") and len({(m[2], m[3]) for m in found if m}) == 6
    assert "look at results/report/report.html" in lines[-1] and "6 runs made" in clone.said
    assert "step/s" not in clone.said and "\r" not in clone.said and "\x1b" not in clone.said
    assert any("step/s" in log.read_text() for log in (clone.root / "runs" / "logs").iterdir()), "what the stages print is in the logs"


@pytest.mark.slow
def test_a_second_time_runs_nothing(clone):
    assert clone.reproduce(jobs=1) == [] and "0 runs made and 6 found up to date" in clone.said
    assert "6 of 6 committed scores found again" in clone.said


@pytest.mark.slow
def test_a_run_again_leaves_git_clean(clone):
    """Seconds differ from time to time; nothing that git tracks does."""
    before = (clone.root / "runs/costs/cb-pt-0.json").read_text()
    shutil.rmtree(clone.root / "runs")
    clone.reproduce()
    assert (clone.root / "runs/costs/cb-pt-0.json").read_text() != before
    assert clone.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_plain_dvc_makes_the_same(clone):
    shutil.rmtree(clone.root / "runs")
    trained = [f"cb:{s}" for s in ("prepare", "train@pt-0", "train@ept-0")]
    assert clone.repro("tasks/cb/dvc.yaml") == sorted(["backbone", *trained]), "what is in git stands"
    assert clone.git("status", "--porcelain") == ""


# ---- what makes a stage stale ---------------------------------------------------------------------------------------------


def edit(file, old, new):
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new, 1))


@pytest.fixture
def back(clone):
    """What a test changes in tracked files, and what was made of it, is undone."""
    yield
    clone.git("checkout", "-q", "--", ".")
    clone.git("clean", "-fdq")
    shutil.rmtree(clone.root / "runs")
    shutil.copytree(clone.root.with_name("runs"), clone.root / "runs")
    assert "up to date" in clone.dvc("status")


@pytest.mark.slow
def test_words_about_code_make_nothing_stale(clone, back):
    edit(clone.root / "ept/model.py", '"""', '"""Another docstring. ')
    edit(clone.root / "ept/training.py", "import hashlib", "import hashlib  # a comment")
    assert clone.stages(clone.dvc("repro", "--dry")) == ["plan"], "the cheap stage reads the code again"
    assert clone.repro("--single-item", "plan") == ["plan"]
    assert clone.stages(clone.dvc("repro", "--dry")) == [] and "up to date" in clone.dvc("status")
    assert clone.git("diff", "--name-only").split() == ["dvc.lock", "ept/model.py", "ept/training.py"], "no fingerprint has changed"


@pytest.mark.slow
def test_a_changed_line_is_seen_by_the_stages_that_reach_it(clone, back):
    edit(clone.root / "ept/evaluation.py", "predictions, labels = ", "predictions, labels = None or ")
    assert "plan:" in clone.call("-m", "dvc", "status")
    assert clone.due() == sorted([*(f"{t}:{s}" for t in TASKS for s in ("evaluate@pt-0", "evaluate@ept-0", "reference@frozen-0")), "report"])


@pytest.mark.slow
def test_code_that_a_stage_does_not_reach_leaves_it_alone(clone, back):
    for module, line in (("figures", "LOOKS = "), ("pretraining", "SENTINELS = "), ("synthetic", "MAKERS = ")):
        edit(clone.root / f"ept/{module}.py", f"\n{line}", f"\n_UNUSED = 1\n{line}")
    assert clone.due() == ["report"]


@pytest.mark.slow
def test_status_tells_the_truth(clone, back):
    status = lambda: subprocess.run(["make", "-s", "status", f"VENV={os.path.relpath(BIN.parent, clone.root)}", "READY=params.yaml"], cwd=clone.root, env=clone.environment(), capture_output=True, text=True).stdout
    assert "up to date" in status()
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "learning_rate": 0.1}})
    said = status()
    assert "plan:" in said and all(f"tasks/{t}/dvc.yaml:train@{m}-0:" in said for t in TASKS for m in ("pt", "ept")) and "reference" not in said
    clone.git("checkout", "-q", "--", ".")
    assert "up to date" in status()
    edit(clone.root / "ept/training.py", "import hashlib", "import hashlib\n\nUNUSED = 1")
    assert "modified:           ept" in status()


@pytest.mark.slow
def test_one_learning_rate_of_one_task_runs_that_task_alone(clone, back):
    before = clone.files("results/scores")
    clone.write({**PARAMETERS, "tasks": {"cola": {}, "cb": {"learning_rate": 0.1}}})
    ran = clone.reproduce()
    assert ran == sorted(["plan", "report", *(f"cb:{s}" for s in OF_A_TASK)])
    after = clone.files("results/scores")
    assert all(after[f"{key}.json"] == before[f"{key}.json"] for key in (*KEYS, "cb-frozen-0") if not key.startswith("cb-") or "frozen" in key)
    assert json.loads(after["cb-pt-0.json"])["config"]["training"]["learning_rate"] == 0.1
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
def test_a_reference_does_not_wait_for_steps(clone, back):
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 6}})
    assert clone.due() == sorted([*(f"{t}:{s}" for t in TASKS for s in OF_A_TASK), "report"])
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "max_length": 64}})
    assert {f"{t}:reference@frozen-0" for t in TASKS} <= set(clone.due())


@pytest.mark.slow
def test_settings_change_nothing(clone, back):
    """Nothing in settings.ini is part of a result's identity."""
    with open(clone.root / "settings.ini", "a") as file:
        file.write("\n# touched\n")
    assert clone.due() == []


@pytest.mark.slow
def test_a_sweep_runs_beside_the_grid(clone, back):
    grid = clone.files("results/scores")
    clone.write({**PARAMETERS, "sweep": {"tasks": ["cb"], "seeds": [0], "sizes": ["rank-1", "short_length-4"]}})
    assert clone.reproduce() == ["plan", "report", "sweep@cb-rank-1-0", "sweep@cb-short_length-4-0"]
    assert "ept cb rank-1 " in clone.said
    after = clone.files("results/scores")
    assert {name: after[name] for name in grid} == grid, "the grid's own runs are left alone"
    own, rank, short = (json.loads(after[f"cb-ept-0{size}.json"]) for size in ("", "-rank-1", "-short_length-4"))
    sizes = own["config"]["sizes"]
    assert "swept" not in own and rank["swept"] == "rank" and rank["config"]["sizes"] == sizes | {"rank": 1}
    assert short["config"]["sizes"] == sizes | {"short_length": 4, "rank": short["config"]["sizes"]["rank"]} and short["config"]["sizes"]["rank"] > sizes["rank"]
    assert rank["config"]["training"] == short["config"]["training"] == own["config"]["training"]
    assert (clone.root / "results/report/figures/sweep.svg").exists()
    assert clone.reproduce(jobs=1) == []


# ---- everyday commands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dvc_answers_about_what_is_there(clone):
    assert "up to date" in clone.dvc("status")
    assert "No changes" in clone.dvc("data", "status")
    graph = clone.dvc("dag", "--dot")
    assert '"tasks/cb/dvc.yaml:train@ept-0" -> "tasks/cb/dvc.yaml:evaluate@ept-0"' in graph and '"plan" -> "backbone"' in graph
    assert "tasks/cb/dvc.yaml:train@ept-0" in clone.dvc("dag")
    summary = json.loads((clone.root / "results/summary.json").read_text())
    shown = json.loads(clone.dvc("metrics", "show", "--json"))[""]["data"]["results/summary.json"]["data"]
    assert shown == summary and set(summary) == {"frozen", "pt", "ept"} and set(TASKS) <= set(summary["ept"])
    plots = json.loads(clone.dvc("plots", "show", "--json"))
    (curves,) = [plot for name, found in plots["data"].items() if "curves" in name for plot in found]
    values = curves["datapoints"]["workspace"] if "datapoints" in curves else json.loads(curves["content"])["data"]["values"]
    assert {row["method"] for row in values} == {"pt", "ept"}


@pytest.mark.slow
def test_dvc_answers_about_a_change(clone, back):
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 6}})
    found = json.loads(clone.dvc("params", "diff", "--json"))
    assert found == {"params.yaml": {"training.steps": {"old": 4, "new": 6, "diff": 2}}}
    ran = clone.repro("tasks/cb/dvc.yaml")
    assert ran == sorted(["plan", *(f"cb:{s}" for s in OF_A_TASK)]), "one task, and what it needs"
    file = clone.root / "results/summary.json"
    values = json.loads(file.read_text())
    values["ept"]["cb"] += 1.0
    file.write_text(json.dumps(values))
    diff = json.loads(clone.dvc("metrics", "diff", "--json"))["results/summary.json"]["ept.cb"]
    assert diff["diff"] == pytest.approx(1.0)


@pytest.mark.slow
def test_an_experiment_runs_and_is_shown(clone, back):
    clone.dvc("exp", "run", "--name", "shorter", "-S", "training.steps=2", "tasks/cb/dvc.yaml")
    assert json.loads((clone.root / "results/scores/cb-pt-0.json").read_text())["config"]["training"]["steps"] == 2
    (baseline,) = [row for row in json.loads(clone.dvc("exp", "show", "--json")) if row["rev"] not in (None, "workspace")]
    steps = lambda row: row["data"]["params"]["params.yaml"]["data"]["training"]["steps"]
    assert steps(baseline) == 4 and [steps(e["revs"][0]) for e in baseline["experiments"]] == [2]
    assert baseline["data"]["metrics"]["results/summary.json"]["data"]["ept"]


# ---- profiles -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(clone):
    """A profile made by `make profile`, in its own folder."""
    clone.call("nbs/pipelines/layout.py", "--new", "mine", "--from", "embedded")
    yield clone.root / "profiles" / "mine"
    shutil.rmtree(clone.root / "profiles", ignore_errors=True)


@pytest.mark.slow
def test_a_copied_profile_says_the_same_about_itself(clone, copied):
    """Another name changes no number and no sentence but the name."""
    assert yaml.safe_load((copied / "params.yaml").read_text()) == PARAMETERS | {"profile": "mine"}
    assert "up to date" in clone.dvc("status"), "another profile is none of the root's business"
    ran = clone.stages(clone.dvc("repro", folder=copied))
    assert sorted(ran) == clone.first
    for key in (*KEYS, "cb-frozen-0"):
        ours, theirs = ((folder / f"results/predictions/{key}.csv").read_bytes() for folder in (clone.root, copied))
        assert ours == theirs
    ours, theirs = ((folder / "results/report/table.md").read_text() for folder in (clone.root, copied))
    wall_clock = lambda text: [line for line in text.replace("mine", "embedded").splitlines() if "time" not in line.lower()]
    assert wall_clock(ours) == wall_clock(theirs) and "says nothing about English" in theirs
    assert "up to date" in clone.dvc("status", folder=copied)
    assert "0 runs made and 6 found up to date" in clone.call("nbs/pipelines/reproduce.py", "--profile", "mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new", "mine"], "there is a profile 'mine' already"),
        (["--new", "a b"], "cannot be the name of a profile"),
        (["--new", "../up"], "cannot be the name of a profile"),
        (["--new", "other", "--from", "embeded"], "did you mean 'embedded'?"),
    ],
)
def test_a_profile_that_cannot_be_made_leaves_nothing_behind(clone, copied, arguments, message):
    assert message in clone.call("nbs/pipelines/layout.py", *arguments, fails=True)
    assert [p.name for p in copied.parent.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "dvc", "repro"], ["-m", "dvc", "repro", "tasks/cb/dvc.yaml"], ["nbs/pipelines/reproduce.py"]], ids=["repro", "task", "reproduce"])
def test_a_hostile_name_reaches_no_shell(clone, back, command):
    hostile = "pt; touch x"
    values = {**PARAMETERS, "grid": {**PARAMETERS["grid"], "methods": ["pt", hostile]}, "methods": {**PARAMETERS["methods"], hostile: {}}}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert "cannot be the name of a method" in clone.call(*command, fails=True)
    assert not list(clone.root.rglob("x"))


@pytest.mark.slow
def test_a_task_more_is_a_line_more(clone, back):
    values = {**PARAMETERS, "tasks": {**PARAMETERS["tasks"], "rte": {}}}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert "run: make pipeline" in clone.dvc("repro", fails=True)
    assert clone.reproduce() == sorted(["plan", "report", *(f"rte:{s}" for s in ("prepare", "reference@frozen-0", *OF_A_TASK))])
    clone.write(PARAMETERS)
    assert not (clone.root / "tasks/rte/dvc.yaml").exists() and clone.reproduce() == ["plan", "report"]


# ---- learning rates and sources -----------------------------------------------------------------------------------------

WITH_TRANSFER = {
    **PARAMETERS,
    "grid": {"references": ["frozen"], "methods": ["pt"], "seeds": [0], "transfer": ["spot"], "sources": ["cola", "cb"]},
    "search": {"factors": [0.5, 1, 2], "steps": 2, "seed": 0},
    "methods": {"frozen": {}, "pt": {}, "spot": {}},
}  # fmt: skip


def search(clone, key):
    return json.loads((clone.root / f"results/search/{key}.json").read_text())


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
        record = json.loads((clone.root / f"results/scores/{task}-spot-0.json").read_text())
        assert list(record["config"]["source_prompts"]) == [other]
        kept = clone.files(f"runs/sources/0/{other}")
        assert set(kept) == {"adapter_config.json", "adapter_model.safetensors"}
        assert all(clone.files(f"runs/adapters/{other}-pt-0")[name] == content for name, content in kept.items())


@pytest.mark.slow
def test_the_search_is_written_down_and_used(clone, transfers):
    for task in TASKS:
        for method in ("pt", "spot"):
            found = search(clone, f"{task}-{method}")
            scores = {t["factor"]: t["validation_score"] for t in found["tried"]}
            assert list(scores) == [0.5, 1.0, 2.0] and scores[found["factor"]] == max(scores.values())
            config = json.loads((clone.root / f"results/scores/{task}-{method}-0.json").read_text())["config"]
            assert config["search"] == {"factor": found["factor"], "factors": [0.5, 1.0, 2.0]}
            assert config["training"]["learning_rate"] == 0.3 * found["factor"] and config["training"]["steps"] == 4
        assert not (clone.root / f"results/search/{task}-frozen.json").exists(), "nothing is trained, so nothing is tried"


@pytest.mark.slow
def test_a_second_time_searches_and_transfers_nothing(clone, transfers):
    assert clone.reproduce(jobs=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("poison", [b"this is no parquet file", None], ids=["poisoned", "missing"])
def test_the_search_does_not_open_the_test_split(clone, transfers, poison):
    test, record = clone.root / "runs/data/cb/test.parquet", clone.root / "results/search/cb-pt.json"
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
    clone.write({**WITH_TRANSFER, "tasks": {"cola": {}, "cb": {"learning_rate": 0.2}}})
    ran = clone.order()
    on_cola = sorted(stage for stage in set(ran) if stage.startswith("cola:"))
    assert on_cola[-2:] == ["cola:search-transfer@spot", "cola:train-transfer@spot-0"] and set(on_cola[:-2]) <= {"cola:evaluate-transfer@spot-0"}
    assert {"source@cb-0", "cb:search@pt", "cb:train@pt-0", "cb:search-transfer@spot", "cb:train-transfer@spot-0"} <= set(ran)
    assert "source@cola-0" not in ran and ran.index("source@cb-0") < ran.index("cola:train-transfer@spot-0")
    assert clone.reproduce(jobs=1) == []
    clone.write(WITH_TRANSFER)


@pytest.mark.slow
def test_a_transfer_in_the_wrong_list_stops_before_anything_trains(clone, transfers):
    clone.write({**WITH_TRANSFER, "grid": {"methods": ["pt", "spot"], "seeds": [0]}})
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
    before = clone.files("runs/adapters")
    assert "did you mean 'learning_rate'?" in clone.run("train", "--task", "cb", "--method", "pt", fails=True)
    assert clone.files("runs/adapters") == before
    assert "error" in (clone.root / "runs/notebooks/train-cb-pt-0.ipynb").read_text()
    clone.write(PARAMETERS)


# ---- killed runs --------------------------------------------------------------------------------------------------------


def kill_in_training(clone, key, step, command):
    """Start a command, kill everything it has started once a checkpoint of `step` is whole; the checkpoints that are left."""
    process = subprocess.Popen([sys.executable, *command], cwd=clone.root, env=clone.environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = clone.root / "runs" / "checkpoints" / key
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
    adapter, scores = f"runs/adapters/{key}", clone.root / f"results/scores/{key}.json"

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
        folder = clone.root / "runs/checkpoints" / key
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
