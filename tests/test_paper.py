"""The `paper` profile, walked once in miniature: from a stand-in for the hub to the report, on this machine and through Slurm.

Its own parameters, cut down: two tasks, two methods and all that these need, ten steps. The weights are random; with
`EPT_TEST_SHAPE=t5-base` they have the shape of T5-base, and with that the walk takes minutes (`make walk`). The rows are some of the real
ones where ../shared/data has them, else made up in the same columns.
"""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from ept.data.tasks import TASKS
from ept.model.backbone import SOURCES
from tests.conftest import byte_tokenizer
from tests.hub import Hub, hub_rows
from tests.miniature import ROOT, Clone
from tests.slurm import Slurm

pytestmark = pytest.mark.slow

SHARED = ROOT.parent / "shared"
SHAPE = os.environ.get("EPT_TEST_SHAPE", "tiny")
CHOSEN = ("multirc", "cb")  # a task whose rows belong together and are cut at another length than all others, and one that is searched on
ROWS = 24  # of each split
TINY = {"d_model": 128, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 320}  # wide enough for the sizes of the profile


def in_miniature(paper):
    """The parameters of the profile, cut down."""
    grid = paper["grid"] | {"methods": ["ept"], "transfer": ["mpt"], "seeds": [0], "sources": list(CHOSEN)}
    search = paper["search"] | {"tasks": ["cb"], "trials": 2, "steps": 10, "sizes": {"ept": paper["search"]["sizes"]["ept"]}}
    training = paper["training"] | {"steps": 10, "batch_size": 4, "warmup_steps": 2, "evaluate_every": 5}
    return paper | {
        "grid": grid,
        "sources": {"steps": 10, "shared_steps": 10},
        "search": search,
        "sweep": {"tasks": ["cb"], "seeds": [0], "sizes": ["rank-4"]},
        "training": training,
        "tasks": {task: paper["tasks"][task] for task in CHOSEN},
    }


def weights(folder):
    """A T5 with random weights, as the hub has it."""
    torch.manual_seed(1)
    real = SHAPE == "t5-base"
    shape = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128} if real else TINY
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "t5-tokenizer") if real else byte_tokenizer(eos=True)
    for part in (T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)), tokenizer):
        part.save_pretrained(folder)
    return folder


def rows(task, split, start):
    """Some rows of a split, in the hub's columns."""
    file = SHARED / "data" / TASKS[task].hub.folder / f"{split}.parquet"
    return pd.read_parquet(file).head(ROWS) if file.exists() else hub_rows(task, ROWS, start)


@pytest.fixture(scope="module")
def paper():
    return in_miniature(yaml.safe_load((ROOT / "profiles" / "paper" / "params.yaml").read_text()))


@pytest.fixture(scope="module")
def hub(paper, tmp_path_factory):
    """The commits that the profile and the tasks name, and nothing else: no branch, no newer commit."""
    with Hub() as hub:
        name, folder = SOURCES[paper["backbone"]["name"]].hub, weights(tmp_path_factory.mktemp("weights"))
        hub.add(name, paper["backbone"]["revision"], folder)
        for task in CHOSEN:
            source = TASKS[task].hub
            for number, split in enumerate(source.splits):
                hub.files[source.repository, source.revision, f"{source.config}/{split}-00000-of-00001.parquet"] = rows(task, split, 100 * number).to_parquet()
        yield hub


class Walk(Clone):
    """A clone whose hub is the stand-in, with the profile in miniature."""

    def __init__(self, root, paper, hub, **cluster):
        self.hub, self.offline = hub, False
        super().__init__(root)
        self.folder = root / "profiles" / "paper"
        self.folder.mkdir(parents=True)
        self.write(paper)
        if cluster:
            entries = "\n".join(f"{name} = {value}" for name, value in cluster.items())
            settings = (root / "settings.ini").read_text().partition("[cluster]")[0]
            (root / "settings.ini").write_text(f"{settings}[cluster]\n{entries}\n")

    def environment(self):
        found = super().environment() | self.hub.environment(self.root / "hub-cache")
        return found | {"HF_HUB_OFFLINE": str(int(self.offline))}

    def python(self, *command, folder):
        """In an interpreter of its own where the hub is asked, for its client keeps the address that it finds when it is imported."""
        if self.offline:
            return super().python(*command, folder=folder)
        return subprocess.run([sys.executable, *command], cwd=folder, env=self.environment(), capture_output=True, text=True)

    def reproduce(self, *words):
        """What `make reproduce PROFILE=paper` says."""
        return self.call("nbs/pipelines/reproduce.py", "--profile", "paper", *words)

    def record(self, name):
        return json.loads((self.folder / "results" / f"{name}.json").read_text())

    def outcome(self):
        """All that does not tell where and when it was made: scores, choices, predictions, adapters."""
        folders = ("results/scores", "results/predictions", "results/search", "results/sources", "results/origins", "runs/adapters", "runs/sources")
        return {f"{folder}/{name}": content for folder in folders for name, content in self.files(self.folder / folder).items()}


@pytest.fixture(scope="module")
def walk(paper, hub, tmp_path_factory):
    """The walk on this machine, and what was said; without a network once the rows and the backbone are there."""
    walk = Walk(tmp_path_factory.mktemp("paper") / "clone", paper, hub)
    walk.fetched = walk.reproduce("--fetch")
    walk.offline = True
    walk.said = walk.reproduce()
    return walk


RUNS = ("multirc-ept-0", "multirc-mpt-0", "cb-ept-0", "cb-mpt-0", "cb-ept-0-rank-4")


def test_the_profile_comes_from_the_hub_to_its_report(walk, paper):
    assert "the rows and the backbone are there" in walk.fetched and "stages: 4 made" in walk.fetched, walk.fetched
    assert "5 runs made and 0 found up to date" in walk.said, walk.said
    page = (walk.folder / "results" / "report" / "report.html").read_text()
    assert all(name in page for name in (*CHOSEN, "ept", "mpt", "t5-base"))
    for run in RUNS:
        record = walk.record(f"scores/{run}")
        assert record["backbone"]["name"] == "t5-base" and record["backbone"]["revision"] == paper["backbone"]["revision"]
        assert record["config"]["training"]["steps"] == 10 and record["config"]["training"]["verbalizer"] == "digits"
        assert record["config"]["sizes"]["max_length"] == (348 if "multirc" in run else 256)
    assert [len(walk.record(f"search/{method}")["trials"]) for method in ("ept", "mpt")] == [2, 2]


def test_what_was_fetched_is_of_the_commits_that_are_named(walk, paper, hub):
    assert walk.record("origins/backbone") == {"name": "t5-base", "revision": paper["backbone"]["revision"]}
    for task in CHOSEN:
        assert walk.record(f"origins/{task}") == {"source": "hub", "revision": TASKS[task].hub.revision}
    commits = {part for path in hub.seen for part in re.findall(r"/(?:resolve|tree|revision)/(\w+)", path)}
    assert commits == {paper["backbone"]["revision"], *(TASKS[task].hub.revision for task in CHOSEN)}, "nothing was asked of a branch"


def test_a_second_time_fetches_and_trains_nothing(walk, hub):
    asked = len(hub.seen)
    assert "0 runs made and 5 found up to date" in walk.reproduce()
    assert len(hub.seen) == asked


@pytest.mark.slurm
@pytest.mark.skipif(os.environ.get("EPT_TEST_SLURM") != "1", reason="starts a Slurm; run `make test-slurm`")
def test_through_slurm_it_comes_to_the_same(walk, paper, hub, tmp_path, monkeypatch):
    jobs = {"engine": "slurm", "workers": 2, "gpus": 1, "cores": 2, "memory": "6GB", "walltime": "01:00:00", "interface": "lo"}
    with Slurm(tmp_path / "slurm", gpus=1) as slurm:
        for name, value in slurm.environment.items():
            monkeypatch.setenv(name, value)
        there = Walk(tmp_path / "clone", paper, hub, **jobs)
        assert "5 runs made and 0 found up to date" in there.reproduce()
    assert there.outcome() == walk.outcome()
