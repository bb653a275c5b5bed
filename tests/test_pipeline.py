"""The pipeline: one command, what DVC runs again and what it leaves alone, everyday commands, profiles, answers to mistakes.

All of it in a miniature of the repository, see miniature.py.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

import forks
from tests.miniature import BIN, PARAMETERS, ROOT, TASKS, Clone

# ---- mistakes, answered by the runner -----------------------------------------------------------------------------------


def ask(*arguments):
    return forks.run("nbs/pipelines/run.py", *arguments, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown stage 'trian'; did you mean 'train'?"),
        (["train", "--tsk", "cb"], "unknown parameter '--tsk'; did you mean '--task'?"),
        (["train", "--task"], "argument --task: expected one argument"),
        (["train", "--seed", "first"], "argument --seed: invalid int value: 'first'"),
        (["train", "--profile-file", "profiles/smolm2/params.yaml"], "no parameter file 'profiles/smolm2/params.yaml'; there are: params.yaml, "),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message):
    done = ask(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_help_lists_every_stage():
    done = ask("--help")
    assert done.returncode == 0
    for stage in ("prepare", "backbone", "search", "source", "train", "reference", "evaluate", "report"):
        assert re.search(rf"(?m)^ +{stage}\b", done.stdout), stage


def test_help_of_a_stage_says_what_its_notebook_says():
    done = ask("train", "--help")
    assert done.returncode == 0
    for text in ("One run: a task, a method, a seed.", "--profile-file", "--task", "--method", "--seed int", "of the prompt's start and the order of examples", "(default: ept)"):
        assert text in done.stdout, text


def test_an_option_may_be_written_with_an_equals_sign():
    done = ask("train", "--profile-file=nowhere.yaml", "--task=cb")
    assert done.returncode == 1 and "no parameter file 'nowhere.yaml'" in done.stderr


def test_unknown_profile_is_named():
    done = forks.run("nbs/pipelines/reproduce.py", "--profile", "smolm2-plain", cwd=ROOT)
    assert done.returncode == 1 and "did you mean 'smollm2-plain'?" in done.stderr


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


KEYS = [f"{t}-{m}-0" for t in ("cb", "cola") for m in ("ept", "pt")]
OF_A_TASK = [f"{stage}@{m}-0" for m in ("pt", "ept") for stage in ("train", "evaluate")]


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
    assert {"report.html", "table.md", "table.csv", "figures/scores.svg", "figures/curves.svg", "figures/gates.svg", "figures/time.svg"} <= set(report)
    assert b"says nothing about English" in report["report.html"] and b"says nothing about English" in report["table.md"]
    results = clone.files("results")
    assert not [f for f in results if str(clone.root).encode() in results[f]], "no path of this machine in a result"
    assert not any((clone.root / "runs/checkpoints").iterdir())


def test_a_line_for_each_finished_run_and_no_bars_without_a_terminal(clone):
    lines = clone.said.splitlines()
    found = [m for line in lines if (m := re.fullmatch(r"\[(\d+)/17\] (frozen|pt|ept) (cola|cb) -?\d+\.\d \(majority -?\d+\.\d\) \d+ s(?:, \d+:\d\d left)?", line))]
    at = [int(m[1]) for m in found]
    assert at == sorted(set(at)) and len({(m[2], m[3]) for m in found}) == 6, "which of the 17 stages ended a run"
    assert "look at results/report/report.html" in lines[-1] and "6 runs made" in clone.said
    assert "step/s" not in clone.said and "\r" not in clone.said and "\x1b" not in clone.said
    assert any("step/s" in log.read_text() for log in (clone.root / "runs" / "logs").iterdir()), "what the stages print is in the logs"


def test_a_second_time_runs_nothing(clone):
    assert clone.reproduce(jobs=1) == [] and "0 runs made and 6 found up to date" in clone.said
    assert "6 of 6 committed scores found again" in clone.said


def test_a_run_again_leaves_git_clean(clone):
    """Seconds differ from time to time; nothing that git tracks does."""
    before = (clone.root / "runs/costs/cb-pt-0.json").read_text()
    shutil.rmtree(clone.root / "runs")
    clone.reproduce()
    assert (clone.root / "runs/costs/cb-pt-0.json").read_text() != before
    assert clone.git("status", "--porcelain") == ""


def test_a_grid_goes_on_in_a_new_clone(clone, back):
    """Adapters are not committed. Records are, and nothing is trained again for them; what new runs read is made."""
    shutil.rmtree(clone.root / "runs")
    assert clone.reproduce("--allow-missing", jobs=1) == [] and "0 runs made and 6 found up to date" in clone.said
    before = clone.files("results/scores")
    clone.write({**PARAMETERS, "methods": {**PARAMETERS["methods"], "pt": {"learning_rate": 0.1}}})
    ran = clone.reproduce("--allow-missing")
    assert ran == sorted(["backbone", "report", *(f"{t}:{s}" for t in TASKS for s in ("prepare", "train@pt-0", "evaluate@pt-0"))])
    after = clone.files("results/scores")
    assert {name for name in after if after[name] != before[name]} == {f"{t}-pt-0.json" for t in TASKS}


def test_plain_dvc_makes_the_same(clone, back):
    shutil.rmtree(clone.root / "runs")
    trained = [f"cb:{s}" for s in ("prepare", "train@pt-0", "train@ept-0")]
    assert clone.repro("tasks/cb/dvc.yaml") == sorted(["backbone", *trained]), "what is in git stands"
    assert clone.git("status", "--porcelain") == ""


# ---- what makes a stage stale ---------------------------------------------------------------------------------------------


def test_words_about_code_make_nothing_stale(clone, back):
    edit(clone.root / "ept/model/modeling.py", '"""', '"""Another docstring. ')
    edit(clone.root / "ept/training/training.py", "import hashlib", "import hashlib  # a comment")
    assert clone.stages(clone.dvc("repro", "--dry")) == ["plan"], "the cheap stage reads the code again"
    assert clone.repro("--single-item", "plan") == ["plan"]
    assert clone.stages(clone.dvc("repro", "--dry")) == [] and "up to date" in clone.dvc("status")
    assert clone.git("diff", "--name-only").split() == ["dvc.lock", "ept/model/modeling.py", "ept/training/training.py"], "no fingerprint has changed"


def test_a_changed_line_is_seen_by_the_stages_that_reach_it(clone, back):
    edit(clone.root / "ept/training/evaluation.py", "metrics = score_task(", "metrics = None or score_task(")
    assert "plan:" in clone.call("-m", "dvc", "status")
    assert clone.due() == sorted(f"{t}:{s}" for t in TASKS for s in ("evaluate@pt-0", "evaluate@ept-0", "reference@frozen-0"))


def test_code_that_a_stage_does_not_reach_leaves_it_alone(clone, back):
    for module, line in (("report/figures", "LOOKS = "), ("training/pretraining", "SENTINELS = "), ("data/synthetic", "MAKERS = ")):
        edit(clone.root / f"ept/{module}.py", f"\n{line}", f"\n_UNUSED = 1\n{line}")
    assert clone.due() == ["report"]


def test_status_tells_the_truth(clone, back):
    status = lambda: (
        subprocess.run(
            ["make", "-s", "status", f"VENV={os.path.relpath(BIN.parent, clone.root)}", "READY=params.yaml"],
            cwd=clone.root,
            env=clone.environment(),
            capture_output=True,
            text=True,
        ).stdout
    )
    assert "up to date" in status()
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "learning_rate": 0.1}})
    said = status()
    assert "plan:" in said and all(f"tasks/{t}/dvc.yaml:train@{m}-0:" in said for t in TASKS for m in ("pt", "ept")) and "reference" not in said
    clone.git("checkout", "-q", "--", ".")
    assert "up to date" in status()
    edit(clone.root / "ept/training/training.py", "import hashlib", "import hashlib\n\nUNUSED = 1")
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


def test_a_reference_does_not_wait_for_steps(clone, back):
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "steps": 6}})
    assert clone.due() == sorted([*(f"{t}:train@{m}-0" for t in TASKS for m in ("pt", "ept")), "report"])
    clone.write({**PARAMETERS, "training": {**PARAMETERS["training"], "max_length": 64}})
    assert {f"{t}:reference@frozen-0" for t in TASKS} <= set(clone.due())


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


def test_dvc_answers_about_what_is_there(clone):
    assert "up to date" in clone.dvc("status")
    assert "No changes" in clone.dvc("data", "status")
    assert json.loads(clone.dvc("diff", "--json")) in ({}, {"added": [], "deleted": [], "modified": [], "renamed": [], "not in cache": []})
    graph = clone.dvc("dag", "--dot")
    assert '"tasks/cb/dvc.yaml:train@ept-0" -> "tasks/cb/dvc.yaml:evaluate@ept-0"' in graph and '"plan" -> "backbone"' in graph
    assert "tasks/cb/dvc.yaml:train@ept-0" in clone.dvc("dag")
    summary = json.loads((clone.root / "results/summary.json").read_text())
    shown = json.loads(clone.dvc("metrics", "show", "--json"))[""]["data"]["results/summary.json"]["data"]
    assert shown == summary and set(summary) == {"frozen", "pt", "ept"} and set(TASKS) <= set(summary["ept"])
    plots = json.loads(clone.dvc("plots", "show", "--json"))
    (curves,) = [plot for name, found in plots["data"].items() if "curves" in name for plot in found]
    assert all(f'"method": "{method}"' in json.dumps(curves) for method in ("pt", "ept"))


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
def test_a_copied_profile_finds_the_same(clone, copied):
    """Another name changes no number; that it changes no sentence of the report is seen in test_results.py."""
    assert yaml.safe_load((copied / "params.yaml").read_text()) == PARAMETERS | {"profile": "mine"}
    assert "up to date" in clone.dvc("status"), "another profile is none of the root's business"
    cb = ("repro", "tasks/cb/dvc.yaml")
    assert len(clone.stages(clone.dvc(*cb, folder=copied))) == len(["plan", "backbone", "prepare", "reference", *OF_A_TASK])
    for key in ("cb-ept-0", "cb-pt-0", "cb-frozen-0"):
        ours, theirs = ((folder / f"results/predictions/{key}.csv").read_bytes() for folder in (clone.root, copied))
        assert ours == theirs
        ours, theirs = (json.loads((folder / f"results/scores/{key}.json").read_text()) for folder in (clone.root, copied))
        assert (ours.pop("profile"), theirs.pop("profile")) == ("embedded", "mine") and ours == theirs
    for key in ("cb-ept-0", "cb-pt-0"):
        assert clone.files(f"runs/adapters/{key}") == clone.files(f"profiles/mine/runs/adapters/{key}")
    assert clone.stages(clone.dvc(*cb, folder=copied)) == []


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
    assert not (clone.root / "tasks/rte/dvc.yaml").exists() and clone.due() == ["report"]


def test_a_folder_that_is_not_there_is_named(clone, back):
    """Nothing is pulled, nothing runs, and what is missing is said once."""
    clone.write({**PARAMETERS, "backbone": {"name": "mine", "folder": "models/mine"}})
    said = clone.call("nbs/pipelines/reproduce.py", fails=True)
    assert said.strip() == "error: params.yaml names the folder 'models/mine', and there is none in the repository; bring it there, or mend the name"
