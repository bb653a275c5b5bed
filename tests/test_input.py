"""What people write wrongly, or others meanly: names for a shell, paths that lead elsewhere, numbers out of range, files that are cut."""

import errno
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

import layout
from ept.grid.configuration import check
from ept.grid.profiles import load_profile, profile_files
from ept.report.results import collect
from ept.training.config import TrainingConfig
from ept.utils.files import write_atomic
from ept.utils.settings import load_settings
from ept.workflow.clusters import Cluster
from tests.test_repository import ALL_KINDS

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "pt; touch x $(touch y) 'z"


def saved(folder, text, name="params.yaml"):
    write_atomic(folder / "settings.ini", "")
    return write_atomic(folder / name, text)


# ---- what DVC makes of a parameter file ---------------------------------------------------------------------------------


def commands(folder, values):
    """Commands of all stages that DVC finds in a profile of every kind of stage, when its parameter file is another one afterwards."""
    profile = load_profile(saved(folder, ALL_KINDS))
    for name, text in layout.generated(replace(profile, file=ROOT / "profiles" / "all-kinds" / "params.yaml")).items():
        write_atomic(folder / name, text)
    write_atomic(folder / "params.yaml", yaml.safe_dump(values))
    write_atomic(folder / "results" / "plan.json", "{}")
    write_atomic(folder / ".dvc" / "config", "[core]\n    no_scm = true\n")
    return {stage.addressing: stage.cmd for stage in Repo(str(folder)).index.stages}


def test_a_name_is_one_word_of_a_command_whatever_dvc_reads(tmp_path):
    """Before `make pipeline` has seen the file, as for a plain `dvc repro`: the plan would refuse it, but nothing is taken for granted."""
    values = yaml.safe_load(ALL_KINDS)
    for group, name in (("grid", "methods"), ("grid", "references"), ("grid", "transfer"), ("grid", "sources"), ("sweep", "tasks"), ("sweep", "sizes"), ("grid", "seeds")):
        values[group][name] = [*values[group][name], HOSTILE]
    found = commands(tmp_path, values)
    hostile = [cmd for cmd in found.values() if "touch" in cmd]
    assert len(hostile) > 20
    for cmd in found.values():
        words = shlex.split(cmd, posix=True)
        assert words[0] == "python" and not any("touch" in word and word != HOSTILE for word in words), cmd


def test_commands_are_what_they_look_like(tmp_path):
    found = commands(tmp_path, yaml.safe_load(ALL_KINDS))
    of = lambda stage: found[next(name for name in found if name.endswith(stage))].partition("run.py ")[2]
    assert of("sst2/dvc.yaml:train@ept-1") == "train --task sst2 --method ept --seed 1"
    assert of("sweep@cola-rank-1-0") == "sweep --task cola --size rank-1 --seed 0"
    assert of("source@sst2-100") == "source --task sst2 --seed 100" and of("search-like@ept") == "search --method ept"


@pytest.mark.parametrize("path", ["models/my model", "models/a: b #1", "models/été", "- x/y", "123", "no"])
def test_a_path_is_that_path_to_dvc(tmp_path, path):
    values = yaml.safe_load(ALL_KINDS) | {"backbone": {"name": "mine", "folder": path}, "data": {"source": "embedded", "folder": path}}
    profile = load_profile(saved(tmp_path, yaml.safe_dump(values, allow_unicode=True)))
    written = layout.generated(replace(profile, file=ROOT / "profiles" / "all-kinds" / "params.yaml"))
    read = lambda file, stage: yaml.safe_load(written[file])["stages"][stage]["deps"]
    assert read("dvc.yaml", "backbone") == [f"../../{path}"] and read("tasks/cola/dvc.yaml", "prepare") == [f"../../{path}/glue/cola"]


@pytest.mark.parametrize("path", ["/models", "../models", "a/../../b", "", "a\n    cmd: touch x", "${training.steps}", "a\\b", "a\x00b"])
def test_a_path_that_leads_elsewhere_is_refused(tmp_path, path):
    for change in ({"backbone": {"name": "mine", "folder": path}}, {"data": {"source": "embedded", "folder": path}}):
        file = saved(tmp_path, yaml.safe_dump(yaml.safe_load(ALL_KINDS) | change))
        with pytest.raises(ValueError, match=rf"params.yaml: {next(iter(change))}\.folder is .*; (give a|a) path"):
            load_profile(file)


# ---- parameters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("grid: {", "grid: null\nmore: {", "unknown parameter 'more'; "),
        ("{steps: 4}", "4", "training is 4; it must be a mapping of parameters"),
        ("sst2: {}", "sst2: []", "tasks.sst2 is [] (list); it must be dict"),
        ("seeds: [0, 1]", "seeds: [0, 1.0]", "grid.seeds has 1.0 (float); write a whole number in digits"),
        ("seeds: [0, 1]", "seeds: [0, 010]", "line 5: 010 is not the same number to all readers of YAML"),
        ("seeds: [0, 1]", "seeds: [0, 4294967296]", "grid.seeds has 4294967296; a seed is a whole number from 0 to 2147483647"),
        ("seeds: [100]", "seeds: [-100]", "search.seeds has -100; a seed is a whole number"),
        ("[sst2, cola]", "[sst2, cola, sst2]", "grid.sources is ['sst2', 'cola', 'sst2']; name each once"),
        ("shared_steps: 8", "shared_steps: 0", "steps is 0; it must be at least 1"),
        ("shared_steps: 8", "share_steps: 8", "sources: unknown parameter 'share_steps'; did you mean 'shared_steps'?"),
        ("[rank-1]", "[rank-01]", "sets rank to '01'; write a whole number"),
        ("[rank-1]", "[spaces-0]", "write a whole number of at least 1"),
        ("folder: data", "folder: data, subsample: {train: 0}", "data.subsample.train is 0; it must be at least 1"),
        ("folder: data", "folder: data, skip: {test: -1}", "data.skip.test is -1; it must be at least 1"),
        ("{steps: 4}", "{steps: 4, steps: 5}", "line 9: 'steps' is given twice, first in line 9"),
        ("{steps: 4}", "{steps: 4, warmup_steps: 5}", "warmup_steps is 5; it must be at most steps, which is 4"),
        ("{steps: 4}", "{steps: 4, validation_examples: -1}", "validation_examples is -1; it must be at least 0"),
        ("{steps: 4}", "{steps: 4, shots: 2.5}", "shots is 2.5 (float); it must be int"),
        ("{steps: 4}", "{steps: 4, verbalizer: word}", "unknown verbalizer 'word'; did you mean 'words'?"),
        ("profile: all-kinds", "profile: all kinds", "'all kinds' cannot be the name of a profile"),
        ("tasks: {sst2", "tasks: {1: {}, sst2", "grid.tasks is 1 (int); it must be str"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_when_it_is_read(tmp_path, old, new, message):
    assert old in ALL_KINDS
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_profile(saved(tmp_path, ALL_KINDS.replace(old, new, 1)))
    assert "params.yaml" in str(error.value), "which file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"steps": 4, "alpha": float("inf")}}, "alpha is inf"),
        ({"training": {"steps": 4, "alpha": float("nan")}}, "alpha is nan"),
        ({"training": {"steps": 4, "rank": -1}}, "rank is -1; it must be at least 1"),
        ({"training": {"steps": 4, "rank": 5000}}, "over budget"),
        ({"sweep": {"tasks": ["cola"], "seeds": [0], "sizes": ["rank-5000"]}}, "cola-ept-0-rank-5000: over budget"),
        ({"methods": {"lora": {"lora_rank": 0}}, "grid": {"methods": ["lora"], "seeds": [0]}, "search": None, "sweep": None}, "lora_rank is 0; it must be at least 1"),
    ],
)
def test_sizes_are_checked_before_anything_is_trained(tmp_path, change, message):
    shutil.copytree(ROOT / "backbone", tmp_path / "backbone") if (ROOT / "backbone").is_dir() else write_atomic(
        tmp_path / "backbone" / "config.json", '{"model_type": "t5", "d_model": 128}'
    )
    file = saved(tmp_path, yaml.safe_dump(yaml.safe_load(ALL_KINDS) | change))
    with pytest.raises(ValueError, match=message):
        check(load_profile(file))


def test_two_profiles_of_one_name_are_refused(tmp_path):
    saved(tmp_path, ALL_KINDS)
    saved(tmp_path / "profiles" / "all-kinds", ALL_KINDS)
    with pytest.raises(ValueError, match="are both called 'all-kinds'"):
        profile_files(tmp_path)


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay", "clip", "learning_rate", "steps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "7", True])
def test_a_training_takes_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be a finite number"):
        TrainingConfig(**{name: value})


# ---- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\ndevice = cuda1\n", "unknown device 'cuda1'; did you mean 'cuda:1'?"),
        ("[run]\nthreads = 100000\n", "threads is 100000; it must be at least 0 and at most 1024"),
        ("[run]\nworkers = -1\n", "workers is -1; it must be at least 0"),
        ("[runn]\n", "unknown section 'runn'; did you mean 'run'?"),
        ("[DEFAULT]\ndevice = cpu\n", "unknown section 'DEFAULT'"),
        ("device = cpu\n", "line 1: 'device = cpu' stands before the first section"),
        ("[run]\ndevice: cpu\ndevice: cuda\n", "line 3: [run] has device already"),
    ],
)
def test_what_is_wrong_with_settings_is_said_with_their_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_settings(write_atomic(tmp_path / "settings.ini", text))
    assert str(error.value).startswith(str(tmp_path / "settings.ini"))


def test_a_misspelled_variable_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EPT_DEVCE", "cpu")
    with pytest.raises(ValueError, match="unknown environment variable 'EPT_DEVCE'; did you mean 'EPT_DEVICE'?"):
        load_settings(write_atomic(tmp_path / "settings.ini", ""))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("workers = 0", "workers is 0; it must be at least 1"),
        ("memory = much", "memory is 'much'"),
        ("walltime = 1 day", "walltime is '1 day'"),
        ("wokers = 2", "unknown parameter 'cluster.wokers'; did you mean 'workers'?"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said_with_its_file(tmp_path, entry, message):
    file = write_atomic(tmp_path / "settings.ini", f"[cluster]\n{entry}\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Cluster.read(file)
    assert str(error.value).startswith(str(file))
    assert Cluster.read(write_atomic(file, "[cluster]\nprologue = echo 100%\n")).prologue == "echo 100%"


# ---- files that were whole once -------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A copy of what the default profile has in git."""
    profile = load_profile(ROOT / "params.yaml")
    for kind in ("scores", "predictions"):
        shutil.copytree(ROOT / "results" / kind, tmp_path / "results" / kind)
    shutil.copy(ROOT / "results" / "costs.csv", tmp_path / "results")
    assert collect(profile, tmp_path)["score"].notna().all()
    return profile, tmp_path


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("results/scores/cola-ept-0.json", 0.5, "is damaged"),
        ("results/scores/cola-ept-0.json", 0, "is damaged"),
        ("results/predictions/cola-ept-0.csv", 0.5, "is cut off in its last row"),
        ("results/predictions/cola-ept-0.csv", "rows", "has 100 whole rows, and the record of the run says 200"),
        ("results/predictions/cola-ept-0.csv", 0, "is damaged"),
        ("results/costs.csv", ",cpu", "is cut off in its last row"),
        ("results/costs.csv", " thread", "is damaged .*inside string"),  # between quotes
    ],
)
def test_a_cut_record_is_named(results, name, keep, message):
    profile, folder = results
    file = folder / name
    content = file.read_text()
    if keep == "rows":
        kept = "".join(content.splitlines(keepends=True)[:101])
    else:
        kept = content[: content.rindex(keep) if isinstance(keep, str) else int(len(content) * keep)].rstrip("\n")
    file.write_text(kept)
    with pytest.raises(ValueError, match=message) as error:
        collect(profile, folder)
    assert str(file) in str(error.value) and "git" in str(error.value), "which file, and what to do"


def test_a_full_disk_names_what_could_not_be_written(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*score\.json"):
        write_atomic(tmp_path / "score.json", "{}")
