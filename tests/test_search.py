"""The search for learning rates and sizes: as many trials for each method, every rate by itself, the same after an interruption."""

import json
import shutil

import pytest
import yaml

import ept.grid.search as module
from ept.grid.configuration import check, read_choice
from ept.grid.preparation import prepare
from ept.grid.profiles import Paths, load_profile
from ept.grid.provision import make_backbone
from ept.grid.runs import train_run
from ept.grid.search import best_trial, plot_trials, search_method, trials_table
from ept.training.config import RATES, NonFiniteLoss
from tests.conftest import byte_tokenizer, tiny_t5
from tests.test_own_task import write_tasks

SEARCH = {
    "tasks": ["reviews", "places"],
    "seeds": [100],
    "trials": 3,
    "steps": 2,
    "rates": {"learning_rate": [0.01, 3], "pair_learning_rate": [1e-4, 0.03], "module_learning_rate": [1e-3, 1], "weight_learning_rate": [1e-4, 0.03]},
    "sizes": {"ept": {"short_length": [8, 4]}, "dept": {"short_length": [8, 16]}},
    "like": {"ept-no-fusion": "ept"},
}
PARAMETERS = {
    "profile": "small",
    "backbone": {"name": "tiny", "folder": "backbone"},
    "data": {"source": "own"},
    "grid": {"methods": ["pt", "ept", "ept-no-fusion", "dept", "lora"], "references": ["frozen"], "seeds": [0]},
    "training": {"steps": 4, "batch_size": 4, "evaluate_every": 1, "prompt_length": 60, "short_length": 8, "max_length": 96},
    "methods": {"lora": {"lora_rank": 2}},
    "tasks": {"reviews": {}, "places": {"pair_learning_rate": 0.005}},
    "search": SEARCH,
}


def write(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMETERS | changed, sort_keys=False))
    return load_profile(folder / "params.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with two small tasks, a tiny backbone, and nothing searched yet."""
    root = tmp_path_factory.mktemp("repository")
    (root / "settings.ini").write_text("[run]\ndevice = cpu\nthreads = 1\n")
    write_tasks(root / "tasks")
    tiny_t5().save_pretrained(root / "backbone")
    byte_tokenizer(eos=True).save_pretrained(root / "backbone")
    profile = write(root)
    make_backbone(profile)
    for task in profile.grid.tasks:
        prepare(profile, task)
    return root


@pytest.fixture
def profile(root, tmp_path):
    """The profile in a folder of its own."""
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    return load_profile(tmp_path / "copy" / "params.yaml")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trainings(monkeypatch, until=None, breaks=lambda training: False):
    """Note every training of a trial; stop at one of them, or break those with certain rates."""
    seen, real = [], module.train

    def train(task, method, seed, backbone, data, *, training, **options):
        seen.append((task.name, seed, training))
        if until is not None and len(seen) > until:
            raise KeyboardInterrupt
        if breaks(training):
            raise NonFiniteLoss("the loss is nan at step 1")
        assert set(data) == {"train", "validation"}, "no test split is read"
        return real(task, method, seed, backbone, data, training=training, **options)

    monkeypatch.setattr(module, "train", train)
    return seen


@pytest.mark.slow
def test_every_method_has_the_same_number_of_trials_and_every_rate_moves_by_itself(profile, capsys):
    had = {"pt": {"learning_rate"}, "lora": {"weight_learning_rate"}, "dept": {"learning_rate", "pair_learning_rate", "short_length"}}
    had["ept"] = had["dept"] | {"module_learning_rate"}
    assert set(profile.tried) == set(had)
    for method in profile.tried:
        record = search_method(profile, method)
        assert json.loads(Paths(profile).record("search", method).read_text()) == record
        assert set(record["space"]) == set(record["chosen"]) == had[method] and len(record["trials"]) == 3
        values = [trial["values"] for trial in record["trials"]]
        assert values[0].get("learning_rate", 0.3) == 0.3 and values[0].get("short_length", 8) == 8, "the first trial has the profile's own"
        for name in had[method] & set(RATES.values()):
            low, high = SEARCH["rates"][name]
            assert len({trial[name] for trial in values}) > 1 and all(low <= trial[name] <= high for trial in values)
        assert record["trials"][record["best"] - 1] == best_trial(record["trials"]) and set(record["trials"][0]["scores"]) == {"reviews", "places"}
        assert len(trials_table(record)) == 3 and len(plot_trials(record).axes) == len(had[method])
    assert len({trial["pair_learning_rate"] / trial["learning_rate"] for trial in values}) == 3 if method == "dept" else True
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert len(lines) == 12 and lines[0].startswith("trial 1/3 of pt: learning_rate 0.3 -> ")
    assert not any(Paths(profile).runs.joinpath("checkpoints").iterdir()), "nothing big is left"


@pytest.mark.parametrize("until", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)], ids=["first", "between tasks", "second trial"])
def test_an_interrupted_search_ends_as_one_that_was_not(profile, monkeypatch, until):
    search_method(profile, "ept")
    record, journal = Paths(profile).record("search", "ept"), Paths(profile).journal("ept")
    whole = record.read_bytes()
    record.unlink()
    journal.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        trainings(patch, until=until)
        search_method(profile, "ept")
    assert not record.exists()
    with monkeypatch.context() as patch:
        seen = trainings(patch)
        search_method(profile, "ept")
    assert len(seen) == 6 - until, "what was finished is not trained again"
    assert record.read_bytes() == whole


def test_a_search_that_is_asked_again_trains_nothing_and_more_trials_go_on(profile, monkeypatch):
    first = search_method(profile, "pt")
    seen = trainings(monkeypatch)
    assert search_method(profile, "pt") == first and not seen
    more = write(profile.file.parent, search=SEARCH | {"trials": 4})
    assert search_method(more, "pt")["trials"][:3] == first["trials"] and len(seen) == 2
    search_method(write(profile.file.parent, search=SEARCH | {"steps": 1}), "pt")
    assert len(seen) == 2 + 6, "with other steps all trials are new"


def test_trials_are_trained_as_runs_are(profile, monkeypatch):
    seen = trainings(monkeypatch)
    search_method(write(profile.file.parent, training=PARAMETERS["training"] | {"warmup_steps": 2}), "dept")
    assert [(task, seed) for task, seed, _ in seen] == [("reviews", 100), ("places", 100)] * 3
    assert {(t.steps, t.warmup_steps, t.batch_size, t.evaluate_every) for _, _, t in seen} == {(2, 1, 4, 1)}
    assert {t.pair_learning_rate for task, _, t in seen if task == "places"} == {0.005}, "what is said of a task still wins"


def test_a_trial_that_breaks_is_recorded_and_one_has_to_hold(profile, monkeypatch):
    with monkeypatch.context() as patch:
        trainings(patch, breaks=lambda training: training.learning_rate == 0.3)
        record = search_method(profile, "pt")
    assert record["trials"][0] == {"number": 1, "values": {"learning_rate": 0.3}, "score": None, "scores": {"reviews": None}}
    assert record["best"] > 1
    Paths(profile).journal("pt").unlink()
    trainings(monkeypatch, breaks=lambda training: True)
    with pytest.raises(RuntimeError, match="training broke in each of the 3 trials, the first with learning_rate 0.3; lower the rates"):
        search_method(profile, "pt")


def test_runs_take_what_was_chosen(profile):
    with pytest.raises(FileNotFoundError, match="run the search stage of ept first"):
        train_run(profile.run("reviews", "ept", 0))
    with pytest.raises(FileNotFoundError, match="run the search stage of ept first"):
        search_method(profile, "ept-no-fusion")
    chosen = search_method(profile, "ept")["chosen"]
    taken = search_method(profile, "ept-no-fusion")
    assert (taken["chosen"], taken["like"]) == (chosen, "ept")
    for method in ("ept", "ept-no-fusion"):
        run = train_run(profile.run("places", method, 0))
        rates = {name: run.config["training"][name] for name in chosen if name in RATES.values()}
        assert rates == {name: chosen[name] for name in rates} | {"pair_learning_rate": 0.005} and run.config["training"]["steps"] == 4
        assert run.config["sizes"]["short_length"] == chosen["short_length"]
        assert json.loads((run.adapter_dir / "search.json").read_text()) == {"from": {"profile": "small", "method": "ept"}, "chosen": chosen}
    assert read_choice(profile.run("places", "frozen", 0)) == {}


def test_another_profile_takes_what_was_chosen(profile):
    other = write(profile.file.parent / "profiles" / "other", profile="other", search={"from": "small"})
    assert (other.searched, other.tried, other.search.origin) == (True, [], "small")
    with pytest.raises(FileNotFoundError, match="make reproduce PROFILE=small"):
        read_choice(other.run("reviews", "pt", 0))
    chosen = search_method(profile, "pt")["chosen"]
    assert read_choice(other.run("reviews", "pt", 0)) == {"from": {"profile": "small", "method": "pt"}, "chosen": chosen}
    with pytest.raises(ValueError, match="'pt' has no trials in profile 'other'"):
        search_method(other, "pt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ["reviws"]}, "search.tasks: unknown task 'reviws'; did you mean 'reviews'?"),
        ({"seeds": [0]}, "search.seeds has 0, which is one of grid.seeds"),
        ({"rates": {"learning_rate": [3, 0.01]}}, "give the lowest and the highest rate"),
        ({"rates": {"learning_rates": [0.01, 3]}}, "did you mean 'learning_rate'?"),
        ({"rates": {"learning_rate": [1, 3]}}, "learning_rate of 'pt' is 0.3 in the profile, and its search has [1.0, 3.0]"),
        ({"sizes": {"ept": {"module_learning_rate": [0.1, 1]}}}, "search.sizes.ept: unknown size 'module_learning_rate'"),
        ({"sizes": {"pt": {"short_length": [8, 4]}}}, "short_length make no difference to 'pt'"),
        ({"sizes": {"ept": {"short_length": [8, 58]}}}, "search.sizes.ept: with short_length 58, no rank is left"),
        ({"sizes": {"ept": {"short_length": [8, 61]}}}, "search.sizes.ept: with short_length 61, short_length m = 61 > prompt_length l = 60"),
        ({"sizes": {"frozen": {"short_length": [8, 4]}}}, "it has to be a method of the grid that trains"),
        ({"like": {"ept-no-fusion": "pt", "pt": "ept"}}, "'pt' has to have trials of its own"),
        ({"trials": 0}, "search.trials is 0; it must be at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_trains(profile, changed, message):
    with pytest.raises(ValueError) as found:
        check(write(profile.file.parent, search=SEARCH | changed))
    assert message in str(found.value)


def test_a_method_without_a_rate_to_search_is_refused(profile):
    with pytest.raises(ValueError, match="there is nothing to search for 'lora': its rates are weight_learning_rate"):
        search_method(write(profile.file.parent, search=SEARCH | {"rates": {"learning_rate": [0.01, 3]}}), "lora")
