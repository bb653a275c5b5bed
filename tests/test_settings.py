"""Settings and files: what is asked wrongly is named, and a failing disk leaves what was there."""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ept.grid.profiles import load_profile
from ept.prompt.decomposition import check_budget
from ept.prompt.soft import EPTConfig
from ept.utils.checking import from_dict, unknown
from ept.utils.files import write_atomic, write_json
from ept.utils.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch):
    file = write_json(tmp_path / "score.json", {"accuracy": 88.2})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"accuracy": 10.0})
    assert file.read_text() == '{\n "accuracy": 88.2\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["score.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = write_atomic(tmp_path / "table.csv", "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, "new")
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "given, guess",
    [("qnl", "qnli"), ("training.qnlii", "qnli"), ("profiles/smolm2/params.yaml", "profiles/smollm2/params.yaml"), ("xyz", None)],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(given, guess):
    message = str(unknown("name", given, ["mnli", "qnli", "profiles/smollm2/params.yaml"]))
    assert repr(given) in message and "mnli, qnli" in message
    assert (f"did you mean {guess!r}?" in message) if guess else ("did you mean" not in message)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    size: int | None = None


def test_nested_configurations_come_from_plain_dictionaries():
    made = from_dict(Outer, {"inner": {"rate": "1e-4"}, "names": ["a", "b"], "size": None})
    assert made == Outer(Inner(1e-4), ("a", "b"), None)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"rat": 1}}, "unknown parameter 'inner.rat'; did you mean 'rate'?"),
        ({"size": "large"}, r"size is 'large' \(str\)"),
        ({"size": True}, r"size is True \(bool\)"),
        ({"inner": 3}, "inner is 3; it must be a mapping"),
        ({"names": "ab"}, "names is 'ab'"),
    ],
)
def test_wrong_values_are_named_with_their_place(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, values)


def test_the_environment_overrides_the_file(tmp_path, monkeypatch):
    file = write_atomic(tmp_path / "settings.ini", "[run]\ndevice = cpu\nthreads = 2\n")
    monkeypatch.setenv("EPT_THREADS", "3")
    assert load_settings(file) == Settings(device="cpu", threads=3)
    monkeypatch.setenv("EPT_PRECISION", "half")
    with pytest.raises(ValueError, match="unknown precision 'half'.*auto, float32, bfloat16"):
        load_settings(file)


def test_an_unknown_setting_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown parameter 'settings.devise'; did you mean 'device'?"):
        load_settings(write_atomic(tmp_path / "settings.ini", "[run]\ndevise = cpu\n"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 25}, r"over budget: .* = 77,057 > l\*d = 100\*768 = 76,800; the largest rank that fits is 24"),
        ({"short_length": 98}, r"no rank is left: .* > l\*d = 76,800; choose a smaller m"),
        ({"short_length": 101}, "short_length m = 101 > prompt_length l = 100"),
        ({"rank": -1}, "rank is -1; it must be at least 1, 0 for no pair"),
        ({"spaces": 0}, "spaces is 0; it must be at least 1"),
        ({"initialisation": "vocab"}, "unknown initialisation 'vocab'; did you mean 'vocabulary'?"),
    ],
)
def test_sizes_that_do_not_fit_state_both_sides(changes, message):
    with pytest.raises(ValueError, match=message):
        EPTConfig(**changes).resolve(768)


@pytest.mark.parametrize("l, m, s, d", [(100, 40, 256, 768), (60, 20, 64, 128), (100, 60, 348, 576), (40, 5, 48, 1024)])
def test_the_derived_rank_is_the_largest_that_fits(l, m, s, d):
    config = EPTConfig(prompt_length=l, short_length=m, max_length=s)
    rank, modules = config.resolve(d).rank, config.module_size(d)
    assert check_budget(l, m, s, d, rank, modules) == config.num_parameters(d) <= l * d
    with pytest.raises(ValueError, match=f"the largest rank that fits is {rank}"):
        check_budget(l, m, s, d, rank + 1, modules)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"folder": "models/mine"}}, "backbone.name is missing; backbone needs name"),
        ({"backbone": {"name": "mine", "folder": "/models/mine"}}, "backbone.folder is '/models/mine'; give a path from the repository's root"),
        ({"backbone": {"name": "mine", "folder": "../mine"}}, "backbone.folder is '../mine'; give a path from the repository's root"),
        ({"backbone": {"name": "nbs/methods"}}, "backbone.name is 'nbs/methods', a folder here; write backbone: {name: what records call it, folder: nbs/methods}"),
        ({"grid": {"methods": ["pt"]}}, "grid.seeds is missing; grid needs tasks, methods, seeds"),
        ({"data": {"folder": "data"}}, "data.source is missing; data needs source"),
    ],
)
def test_what_a_profile_lacks_is_named(changes, message, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(yaml.safe_load((ROOT / "params.yaml").read_text()) | changes))
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs" / "methods").mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_profile(tmp_path / "params.yaml")
