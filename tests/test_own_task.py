"""A task of one's own, from its files to the report: a grid of three methods with a search, in a miniature of the repository."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

import layout
from ept.data.loading import load_task
from ept.data.task_files import read_task
from ept.data.tasks import SPLITS
from ept.grid.profiles import load_profile
from tests.miniature import PARAMETERS, ROOT, Clone

METHODS = ("pt", "ept", "lora")
LABELS = ("bad", "fair", "good")
REVIEWS = """
fields: [review]           # of a CSV that is split here
labels: [bad, fair, good]
metrics: [accuracy, macro_f1]
data: {file: reviews.csv, seed: 7}
"""
PLACES = """
fields: [question, town]
labels: [no, yes]
metrics: [accuracy, f1]
template: "town: {town} question: {question}"
data: {train: places/a.csv, validation: places/b.csv, test: places/c.jsonl, label: so}
"""


def reviews(count=60):
    return "review,label\n" + "".join(f"the soup number {i} was {LABELS[i % 3]},{LABELS[i % 3]}\n" for i in range(count))


def places(start, count):
    return [{"question": f"Is it far to house {i}?", "town": "Ghent", "so": ("no", "yes")[i % 2]} for i in range(start, start + count)]


def write_tasks(folder):
    """Two tasks: one file that is split, and a file for each split."""
    (folder / "places").mkdir(parents=True)
    (folder / "reviews.yaml").write_text(REVIEWS)
    (folder / "reviews.csv").write_text(reviews())
    (folder / "places.yaml").write_text(PLACES)
    for name, start, count in (("a", 0, 24), ("b", 30, 8)):
        lines = [",".join(row.values()) for row in places(start, count)]
        (folder / "places" / f"{name}.csv").write_text("\n".join(["question,town,so", *lines]) + "\n")
    (folder / "places" / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in places(50, 10)))
    return folder


# ---- files --------------------------------------------------------------------------------------------------------------


def test_a_task_file_brings_its_rows(tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    whole, split = (load_task(read_task(folder / name)) for name in ("reviews.yaml", "places.yaml"))
    assert [len(whole[s]) for s in SPLITS] == [48, 6, 6] and [len(split[s]) for s in SPLITS] == [24, 8, 10]
    assert whole["train"].features["label"].names == list(LABELS) and list(split["train"]["label"])[:3] == [0, 1, 0]
    texts = [row for s in SPLITS for row in whole[s]["review"]]
    assert len(set(texts)) == 60, "rows are split, not lost or doubled"
    (folder / "reviews.yaml").write_text(REVIEWS.replace("seed: 7", "seed: 8"))
    other = load_task(read_task(folder / "reviews.yaml"))
    assert other["test"]["review"] != whole["test"]["review"], "the file's seed decides"


@pytest.mark.parametrize("text, value", [("no", "no"), ("1.50", "1.50"), ("010", "010"), ("null", "null"), ("~", "~")])
def test_a_label_is_the_text_that_stands_there(tmp_path, text, value):
    (tmp_path / "t.yaml").write_text(f"fields: [a]\nlabels: [{text}, zzz]\ndata: {{file: t.csv}}")
    assert read_task(tmp_path / "t.yaml").labels == (value, "zzz")


@pytest.mark.parametrize("text", ["data: {source: embedded, folder: data}", "data:  # made up\n  source: embedded\n\n  folder: data # there", "data: {}"])
@pytest.mark.parametrize("tasks", ["tasks:\n  cola: {steps: 3}\n\n  cb: {}\n", "tasks: {cola: {}}", "tasks:  # of the grid\n    cola:\n"])
def test_tasks_take_the_place_of_others_in_a_parameter_file(text, tasks):
    before = f"# a profile\nprofile: x\n\n{text}\n\ngrid: {{seeds: [0]}} # tasks: none\n{tasks}"
    after = layout.with_tasks(before, ["reviews", "places"])
    assert yaml.safe_load(after) == {"profile": "x", "data": {"source": "own"}, "grid": {"seeds": [0]}, "tasks": {"reviews": {}, "places": {}}}
    assert [line for line in before.splitlines() if "#" in line and "there" not in line] == [line for line in after.splitlines() if "#" in line and "names its files" not in line]


@pytest.mark.parametrize("search", [" {tasks: [cola, cb], trials: 2}", "  # on few\n  trials: 2\n  tasks: [cola]  # one", "\n  tasks:\n  - cola\n  - cb\n  trials: 2"])
def test_a_search_moves_to_the_other_tasks(search):
    after = layout.with_tasks(f"profile: x\ndata: {{}}\nsearch:{search}\ntasks: {{cola: {{}}}}\n", ["reviews", "places"])
    assert yaml.safe_load(after)["search"] == {"tasks": ["reviews", "places"], "trials": 2}


def test_copied_files_lie_beside_each_other(tmp_path):
    folder = write_tasks(tmp_path / "here")
    copied = tmp_path / "there"
    assert [layout.copy_task(folder / f"{name}.yaml", copied) for name in ("reviews", "places")] == ["reviews", "places"]
    assert {p.relative_to(copied).as_posix() for p in copied.rglob("*.*")} == {"reviews.yaml", "reviews.csv", "places.yaml", "places/a.csv", "places/b.csv", "places/c.jsonl"}
    other = write_tasks(tmp_path / "other")
    (other / "reviews.csv").write_text(reviews(9))
    with pytest.raises(ValueError, match="two tasks name different files reviews.csv"):
        layout.copy_task(other / "reviews.yaml", copied)
    (other / "reviews.yaml").write_text(REVIEWS.replace("reviews.csv", "../here/reviews.csv"))
    with pytest.raises(ValueError, match="lie beside it, or below"):
        layout.copy_task(other / "reviews.yaml", tmp_path / "new")


PROFILE = """
profile: mine
backbone: {name: embedded, folder: backbone}
data: {source: embedded, folder: data}
grid: {methods: [pt], seeds: [0]}
search: {tasks: [reviews], seeds: [100], rates: {learning_rate: [0.01, 3]}}
tasks: {reviews: {}, cola: {}}
"""


def test_profiles_share_the_task_files_of_the_root(tmp_path):
    """A task file in the root's folder is found by every profile, but for one that has its own."""
    for name in ("settings.ini", "params.yaml", "profiles/mine/params.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PROFILE)
    write_tasks(tmp_path / "tasks")
    load = lambda: load_profile(tmp_path / "profiles" / "mine" / "params.yaml")
    assert load().task("reviews").data.folder == tmp_path / "tasks"
    write_tasks(tmp_path / "profiles" / "mine" / "tasks")
    assert load().task("reviews").data.folder == tmp_path / "profiles" / "mine" / "tasks"


def test_only_stages_of_an_own_task_depend_on_its_files(tmp_path):
    (tmp_path / "params.yaml").write_text(PROFILE)
    write_tasks(tmp_path / "tasks")
    read = load_profile(tmp_path / "params.yaml")
    task = read.task("reviews")
    shared = replace(task, data=replace(task.data, folder=ROOT / "tasks"))
    written = layout.generated(replace(read, file=ROOT / "profiles" / "mine" / "params.yaml", own={"reviews": shared}))
    stages = lambda file: yaml.safe_load(written[file])["stages"]
    own, cola = stages("tasks/reviews/dvc.yaml"), stages("tasks/cola/dvc.yaml")
    assert "../../tasks/reviews.yaml" in stages("dvc.yaml")["plan"]["deps"]
    assert own["prepare"]["deps"] == ["../../tasks/reviews.csv"] and cola["prepare"]["deps"] == ["../../data/glue/cola"]
    for stage in ("prepare", "train", "evaluate"):
        assert "text.reviews" in json.dumps(own[stage]["params"]) and "reviews" not in json.dumps(cola[stage])
    search = stages("dvc.yaml")["search"]
    assert "text.reviews" in json.dumps(search["params"]) and "cola" not in json.dumps(search)
    assert not any("test" in path or path == "runs/data/reviews" for path in search["deps"])


# ---- a grid -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A miniature with a profile on two tasks of one's own, made and run by one command each."""
    clone = Clone(tmp_path_factory.mktemp("own") / "clone")
    grid = {"methods": list(METHODS), "seeds": [0]}
    training = {**PARAMETERS["training"], "steps": 4, "max_length": 96}
    search = {"tasks": ["cola"], "seeds": [100], "trials": 2, "steps": 2, "rates": {"learning_rate": [0.01, 3], "weight_learning_rate": [1e-4, 0.03]}}
    clone.write({**PARAMETERS, "grid": grid, "search": search, "training": training, "methods": {"lora": {"lora_rank": 2}}})
    folder = write_tasks(clone.root / "mine")
    clone.call("nbs/pipelines/layout.py", "--new", "mine", "--from", "embedded", "--tasks", str(folder / "reviews.yaml"), str(folder / "places.yaml"))
    clone.profile = clone.root / "profiles" / "mine"
    clone.said = clone.call("nbs/pipelines/reproduce.py", "--profile", "mine")
    return clone


def due(clone):
    """Stages of the profile that `dvc repro` would run once the plan is there."""
    clone.dvc("repro", "--single-item", "plan", folder=clone.profile)
    return sorted(clone.stages(clone.dvc("repro", "--dry", folder=clone.profile)))


def edited(clone, name, old, new):
    """Edit a file of a task; what is due then."""
    file = clone.profile / "tasks" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    try:
        return due(clone)
    finally:
        file.write_text(text)


RUNS = [*(f"search@{m}" for m in METHODS), *(f"reviews:{kind}@{m}-0" for m in METHODS for kind in ("train", "evaluate"))]


@pytest.mark.slow
def test_a_grid_on_own_tasks_ends_in_a_report_with_statistics(clone):
    assert "6 runs made" in clone.said
    results = clone.profile / "results"
    for task, n, metrics in (("reviews", 6, {"accuracy", "macro_f1"}), ("places", 10, {"accuracy", "f1"})):
        for method in METHODS:
            record = json.loads((results / f"scores/{task}-{method}-0.json").read_text())
            assert (record["task"], record["n"], record["metric"], set(record["metrics"])) == (task, n, "accuracy", metrics)
            assert record["config"]["search"]["from"] == {"profile": "mine", "method": method} and record["examples"]["train"] in (48, 24)
    table, page = (results / "report" / "table.md").read_text(), (results / "report" / "report.html").read_text()
    assert "reviews" in table and "own data" in table and "p bootstrap" in table and "p Wilcoxon" in table
    for words in ("published", "benchmark", "made-up", "says nothing about English", "proves the machinery"):
        assert words not in table and words not in page, words
    plan = (results / "plan.json").read_text()
    own = {method: values["parameters"] for method, values in json.loads(plan)["methods"].items()}
    assert own == {"pt": {}, "ept": {}, "lora": {"lora_rank": 2}}
    assert str(clone.root) not in plan, "no path of this machine in a result"
    assert due(clone) == []


@pytest.mark.slow
def test_a_row_of_one_task_is_that_tasks_business(clone):
    assert edited(clone, "reviews.csv", "number 3 was", "number 3 was very") == ["reviews:prepare"]
    assert edited(clone, "places/b.csv", "Ghent", "Oslo") == ["places:prepare"]
    rows, text = clone.profile / "tasks" / "reviews.csv", reviews()
    rows.write_text(text.replace("soup number", "stew number"))
    clone.dvc("repro", "--single-item", "tasks/reviews/dvc.yaml:prepare", folder=clone.profile)
    assert due(clone) == sorted(RUNS)
    rows.write_text(text)
    clone.dvc("repro", "--single-item", "tasks/reviews/dvc.yaml:prepare", folder=clone.profile)
    assert due(clone) == []


@pytest.mark.slow
def test_what_a_task_file_says_is_that_tasks_business(clone):
    assert edited(clone, "reviews.yaml", "data:", 'template: "It says: {review}"\ndata:') == sorted(["reviews:prepare", *RUNS]), "the rows are the same, the text is not"
    assert edited(clone, "reviews.yaml", "of a CSV", "of my CSV") == [], "a comment is nobody's"
    (clone.profile / "tasks" / "reviews.yaml").write_text(REVIEWS.replace("fields", "feilds"))
    assert "did you mean 'fields'?" in clone.dvc("repro", folder=clone.profile, fails=True)
    (clone.profile / "tasks" / "reviews.yaml").write_text(REVIEWS)
    assert due(clone) == []


@pytest.mark.slow
def test_a_copy_of_a_profile_takes_its_tasks_along(clone):
    clone.call("nbs/pipelines/layout.py", "--new", "again", "--from", "mine")
    ours, theirs = ({p.relative_to(folder / "tasks"): p.read_text() for p in (folder / "tasks").rglob("*.*")} for folder in (clone.profile, clone.profile.with_name("again")))
    assert {name: text for name, text in ours.items() if name.name != "dvc.lock"} == theirs
    shared = clone.root / "tasks" / "places.yaml"
    shutil.copytree(clone.root / "mine", shared.parent, dirs_exist_ok=True)
    clone.call("nbs/pipelines/layout.py", "--new", "sharing", "--from", "again", "--tasks", str(shared))
    sharing = clone.profile.with_name("sharing")
    assert [p.name for p in (sharing / "tasks").rglob("*.*")] == ["dvc.yaml"], "a task file of the root is not copied"
    assert "../../tasks/places/a.csv" in (sharing / "tasks/places/dvc.yaml").read_text()


@pytest.mark.slow
def test_a_profile_that_cannot_take_the_tasks_is_not_made(clone):
    full = {**PARAMETERS, "grid": {"methods": ["pt"], "seeds": [0], "transfer": ["spot"], "sources": ["cola", "cb"]}}
    clone.write(full)
    answer = clone.call("nbs/pipelines/layout.py", "--new", "other", "--from", "embedded", "--tasks", "mine/reviews.yaml", fails=True)
    assert "task 'cola' is one of the benchmarks" in answer and "begin with another profile" in answer
    answer = clone.call("nbs/pipelines/layout.py", "--new", "other", "--from", "embedded", "--tasks", "mine/nowhere.yaml", fails=True)
    assert "there is no task file" in answer and "mine/nowhere.yaml" in answer
    assert not (clone.root / "profiles" / "other").exists()
