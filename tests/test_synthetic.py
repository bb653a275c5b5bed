"The embedded data sets: hub schema, held-out words and frames, same bytes each time."

import re

import pyarrow.parquet as pq
import pytest

from ept.data.loading import load_task
from ept.data.synthetic import HELD_OUT, MAKERS, SCHEMAS, Speaker, examples, make_task, parquet_bytes, public_splits, write_datasets
from ept.data.tasks import TASKS, mark_spans


@pytest.fixture(scope="module")
def made():
    return {name: make_task(name) for name in MAKERS}


def texts(frame):
    return [tuple(v for v in row.values() if isinstance(v, str)) for row in frame.to_dict("records")]


def words(frame):
    return {w for row in texts(frame) for v in row for w in re.findall(r"\w+", v.lower())}


def test_rows_are_made_for_known_tasks():
    assert len(MAKERS) == 13 and set(MAKERS) <= set(TASKS), "the paper's; another task needs no grammar"


@pytest.mark.parametrize("name", list(MAKERS))
def test_columns_labels_and_sizes(made, name):
    task = TASKS[name]
    assert set(made[name]) == set(task.hub.splits)
    for frame in made[name].values():
        assert list(frame) == list(SCHEMAS[name])
        assert not frame.isna().any().any() and frame.astype(str).ne("").all().all()
        if task.regression:
            assert frame["label"].between(0, 5).all() and {f"{v:.1f}" for v in frame["label"]} <= set(task.labels)
        else:
            assert tuple(SCHEMAS[name]["label"].names) == task.labels
            assert sorted(set(frame["label"])) == list(range(len(task.labels)))
            assert frame["label"].value_counts(normalize=True).iloc[0] <= 0.62
        assert 200 <= len(frame) <= 600


@pytest.mark.parametrize("name", list(MAKERS))
def test_evaluation_holds_what_training_never_says(made, name):
    train, *others = made[name].values()
    assert not words(train) & HELD_OUT
    for frame in others:
        assert words(frame) - words(train)
        assert not set(texts(train)) & set(texts(frame))
        assert len(set(texts(frame))) == len(frame)


@pytest.mark.parametrize("name", list(MAKERS))
def test_text_is_written_properly(made, name):
    for frame in made[name].values():
        for row in texts(frame):
            for text in row:
                assert text == " ".join(text.split())
                assert not re.search(r"\ba [aeiou]|[{}/|]| [.,?]", text), text


def test_spans_are_parts_of_the_text(made):
    for frame in made["wsc"].values():
        for row in frame.to_dict("records"):
            split = row["text"].split()
            assert row["span1_text"] in row["text"] and row["span2_text"] in row["text"]
            assert split[row["span1_index"]] == row["span1_text"].split()[0]
            assert split[row["span2_index"]].rstrip(".,") == row["span2_text"]
            marked = mark_spans(row["text"], row["span1_text"], row["span1_index"], row["span2_text"], row["span2_index"])
            assert marked.count("*") == marked.count("#") == 2


def test_offsets_are_those_of_the_word(made):
    for frame in made["wic"].values():
        for row in frame.to_dict("records"):
            for i in "12":
                assert row[f"sentence{i}"][row[f"start{i}"] : row[f"end{i}"]].lower() == row["word"]


def test_answers_belong_to_numbered_questions(made):
    for frame in made["multirc"].values():
        index = list(frame["idx"])
        assert len({(i["question"], i["answer"]) for i in index}) == len(index)
        by_question = frame.groupby([i["question"] for i in index])
        assert by_question["question"].nunique().eq(1).all() and by_question["label"].sum().ge(1).all()


def test_same_bytes_each_time(tmp_path):
    once = {f.relative_to(tmp_path / "a"): f.read_bytes() for f in write_datasets(tmp_path / "a")}
    again = {f.relative_to(tmp_path / "b"): f.read_bytes() for f in write_datasets(tmp_path / "b")}
    assert once == again
    assert {str(f.parent) for f in once} == {TASKS[n].hub.folder for n in MAKERS}


SIZES = {"train": 30, "validation": 20, "test": 40}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_data_set_with_a_test_split_of_rows_that_nobody_has_met(made, name, tmp_path):
    met = {row for frame in made[name].values() for row in texts(frame)}
    taken = lambda task, row: task == name and tuple(v for v in row.values() if isinstance(v, str)) in met
    new = make_task(name, 1, SIZES, taken)
    assert [len(new[split]) for split in public_splits(name, SIZES)] == list(public_splits(name, SIZES).values())
    train, *others = (set(texts(frame)) for frame in new.values())
    assert not set.union(*others) & (met | train) and not set.intersection(*others) and sum(map(len, others)) == 60
    again = make_task(name, 1, SIZES, taken)
    assert all(parquet_bytes(name, new[split]) == parquet_bytes(name, again[split]) for split in new)


def test_a_test_split_is_read_where_there_is_one(tmp_path):
    write_datasets(tmp_path, 1, SIZES)
    for name in MAKERS:
        data = load_task(name, "embedded", tmp_path)
        assert {split: len(rows) for split, rows in data.items()} == SIZES, name
        assert not {TASKS[name].text(row) for row in data["validation"]} & {TASKS[name].text(row) for row in data["test"]}


def test_too_many_rows_are_refused_by_number():
    words = iter(range(30))
    with pytest.raises(ValueError, match="task 'sst2' has no more than about 30 new rows for validation, not 400; ask for fewer"):
        make_task("sst2", taken=lambda name, row: next(words, None) is None)


def test_file_holds_the_features(made, tmp_path):
    (tmp_path / "cb.parquet").write_bytes(parquet_bytes("cb", made["cb"]["train"]))
    table = pq.read_table(tmp_path / "cb.parquet")
    assert table.column_names == ["premise", "hypothesis", "idx", "label"]
    assert b"contradiction" in table.schema.metadata[b"huggingface"] and b"pandas" not in table.schema.metadata


def test_seeds_make_other_rows():
    assert not make_task("rte", 1)["train"].equals(make_task("rte", 0)["train"])
    first, second = (next(examples("cola", Speaker(i)))[0] for i in (0, 1))
    assert first != second


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown task 'qnl'; did you mean 'qnli'"):
        make_task("qnl")
    with pytest.raises(ValueError, match="vocabulary is 'test'"):
        Speaker(0, "test")
