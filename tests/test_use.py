"""A trained prompt in use: it says what it is for, brings its backbone, and answers as `evaluate` does."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import transformers
from datasets import Dataset

from ept import Classifier, TrainingConfig, evaluate, generation_pipeline, load_backbone, train
from ept.data.tasks import Task
from ept.methods.registry import build_method
from ept.model.backbone import Backbone
from ept.training.purpose import Purpose, read_purpose, write_purpose
from tests.conftest import MODELS, byte_tokenizer, perturbed, tiny_backbone

DESK = Task("desk", ("message",), ("billing", "repair", "other"), ("accuracy", "macro_f1"), question="{message}\nWhich desk?\nDesk:")
PAIR = Task("pair", ("one", "two"), ("no", "yes"), may_be_empty=("two",))
LIKING = Task("liking", ("text",), ("0.0", "0.5", "1.0"), ("pearson",), regression=True)
ROWS = {
    "desk": {"message": [f"{'a longer message ' * (i % 3)}number {i}" for i in range(7)], "label": [i % 3 for i in range(7)]},
    "pair": {"one": ["this", "that", "the other"], "two": ["that", "", "this and that"], "label": [0, 1, 1]},
    "liking": {"text": ["good", "bad", "so so", "not bad at all"], "label": [1.0, 0.0, 0.5, 0.7]},
}
SIZES = dict(prompt_length=40, short_length=6, max_length=64, spaces=2, space_width=1, fusion_width=1)


def in_use(backbone, task, method="ept"):
    """A model of a method with random numbers, and the classifier that it makes."""
    model = perturbed(build_method(method, backbone.model, **SIZES))
    return model, Classifier(model, backbone, Purpose.of(task, backbone, 64))


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("task", [DESK, PAIR, LIKING], ids=lambda task: task.name)
def test_answers_are_those_of_evaluate(kind, task):
    backbone = tiny_backbone(kind)
    model, clf = in_use(backbone, task)
    rows = Dataset.from_dict(ROWS[task.name])
    expected = evaluate(model, task, backbone, {"test": rows}, max_length=64)
    found = clf(rows)
    assert clf.model.folded and not model.folded
    assert found.label.tolist() == (pytest.approx(expected.predictions, abs=1e-4) if task.regression else [task.labels[i] for i in expected.predictions])
    for row in found.itertuples():
        assert list(row.probabilities) == list(task.labels) and sum(row.probabilities.values()) == pytest.approx(1, abs=1e-5)
        if task.regression:
            assert row.label == pytest.approx(sum(float(value) * p for value, p in row.probabilities.items()), abs=1e-4)
        else:
            assert row.label == max(row.probabilities, key=row.probabilities.get)


def test_a_generation_task_is_answered_in_words():
    backbone, task = tiny_backbone("llama"), Task("reply", ("message",), generation=True, answer_tokens=4)
    model, clf = in_use(backbone, task)
    rows = Dataset.from_dict({"message": ["a message", "another one"], "label": ["thanks", "no"]})
    assert clf(rows).label.tolist() == evaluate(model, task, backbone, {"test": rows}, max_length=64).predictions
    assert list(clf(rows).columns) == ["label"] and "free text" in repr(clf)


@pytest.mark.parametrize("method", ["ept-text-gate", "bitfit", "pt", "frozen"])
def test_prompts_that_are_no_constant_answer_too(method):
    backbone = tiny_backbone("t5")
    model, clf = in_use(backbone, DESK, method)
    assert clf.model.folded == (method in ("pt", "frozen"))
    rows = Dataset.from_dict(ROWS["desk"])
    assert clf(rows).label.tolist() == [DESK.labels[i] for i in evaluate(model, DESK, backbone, {"test": rows}, max_length=64).predictions]


def test_every_form_of_a_table_gives_the_same_answers():
    _, clf = in_use(tiny_backbone("t5"), DESK)
    texts = ROWS["desk"]["message"]
    expected = clf(texts)
    for form in (
        tuple(texts),
        pd.Series(texts),
        {"message": texts},
        [{"message": text, "number": i} for i, text in enumerate(texts)],
        pd.DataFrame({"number": range(7), "message": texts}),
        Dataset.from_dict({"message": texts}),
    ):
        pd.testing.assert_frame_equal(clf(form), expected)
    assert clf(texts[2]).label.tolist() == expected.label.tolist()[2:3]
    shuffled = pd.DataFrame({"message": texts}, index=list("abcdefg")).iloc[::-1]
    assert clf(shuffled).index.tolist() == list("gfedcba") and clf(shuffled).label.tolist() == expected.label.tolist()[::-1]
    for nothing in ([], {"message": []}, pd.DataFrame({"message": []})):
        assert list(clf(nothing).columns) == ["label", "probabilities"] and not len(clf(nothing))


def test_the_size_of_a_batch_changes_no_answer():
    _, clf = in_use(tiny_backbone("llama"), DESK)
    alone, together = clf(ROWS["desk"], tokens=1), clf(ROWS["desk"])
    assert alone.label.tolist() == together.label.tolist()
    for one, other in zip(alone.probabilities, together.probabilities):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a text", None], "row 1, column 'message': the text is empty"),
        (["a text", "  "], "row 1, column 'message': the text is empty"),
        (pd.DataFrame({"message": [float("nan")]}), "row 0, column 'message': the text is empty"),
        (pd.DataFrame({"text": ["a"]}), r"column 'message' is missing; the columns are \['text'\] and task 'desk' needs \['message'\]"),
        ([{"text": "a"}], "column 'message' is missing"),
        ([["a", "b"]], "column 'message' is missing"),
        ({"message": ["a"], "more": ["b", "c"]}, "the rows to answer are dict .*; give a text, a list of texts, or a table with message"),
        ({"message": [["a", "b"]]}, "is a list; it must be one text, number or date"),
        (7, "the rows to answer are int 7; give a text, a list of texts, or a table with message"),
        (None, "the rows to answer are NoneType None"),
    ],
)
def test_what_cannot_be_answered_is_refused(rows, message):
    _, clf = in_use(tiny_backbone("t5"), DESK)
    with pytest.raises(ValueError, match=message):
        clf(rows)


def test_texts_alone_do_not_do_for_two_fields():
    _, clf = in_use(tiny_backbone("t5"), PAIR)
    with pytest.raises(ValueError, match="task 'pair' reads one, two, and texts alone were given; give a table with these columns"):
        clf(["this", "that"])
    missing = clf({"one": ["this"], "two": [None]})
    assert missing.equals(clf({"one": ["this"], "two": [""]})), "where a text may be empty, nothing is an empty text"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A backbone in a folder, and the adapter of a training of two steps on it."""
    place = tmp_path_factory.mktemp("trained")
    MODELS["llama"]().save_pretrained(place / "model")
    byte_tokenizer(eos=False).save_pretrained(place / "model")
    backbone, rows = load_backbone(str(place / "model")), Dataset.from_dict(ROWS["desk"])
    data = {"train": rows, "validation": rows, "test": rows}
    training = TrainingConfig(steps=2, batch_size=2, evaluate_every=2, verbalizer="digits")
    return train(DESK, "ept", 0, backbone, data, place / "adapter", training=training, sizes=SIZES, progress=False), data


def test_a_training_says_what_its_adapter_is_for(trained):
    run, data = trained
    purpose = read_purpose(run.adapter_dir)
    assert purpose.task == DESK and purpose.max_length == 64 and purpose.verbalizer == "digits"
    clf = Classifier.from_pretrained(run.adapter_dir)
    expected = evaluate(run.adapter_dir, DESK, clf.backbone, data)
    assert clf(data["test"]).label.tolist() == [DESK.labels[i] for i in expected.predictions]
    assert (str(clf.model.device), clf.model.config.model_type) == ("cpu", "llama")


def test_an_adapter_names_its_backbone_as_the_backbone_calls_itself(trained, tmp_path):
    run, _ = trained
    folder = run.adapter_dir.parent / "model"
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "backbone.json").write_text(json.dumps({"name": "own/model", "revision": "c" * 40}))
    backbone = load_backbone(str(tmp_path / "model"))
    build_method("pt", backbone.model, **SIZES).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["backbone"]["name"] == "own/model"
    write_purpose(tmp_path / "adapter", Purpose.of(DESK, backbone, 64))
    said = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert said["backbone"] == {"name": "own/model", "revision": "c" * 40}
    assert str(tmp_path) not in json.dumps(said), "the folder of this machine is nobody else's business"


def test_another_backbone_is_refused(trained):
    run, _ = trained
    other = perturbed(MODELS["llama"]().requires_grad_(True))
    with pytest.raises(ValueError, match="with other weights than this backbone has"):
        Classifier.from_pretrained(run.adapter_dir, Backbone(other, byte_tokenizer(eos=False), "other"))


def test_what_an_adapter_is_for_is_checked(tmp_path):
    backbone = tiny_backbone("t5")
    file = write_purpose(tmp_path, Purpose.of(DESK, backbone, 64, "digits"))
    whole = json.loads(file.read_text())
    assert read_purpose(tmp_path).backbone.name == "tiny-t5" and read_purpose(tmp_path).task == DESK
    for change, message in (
        ({"format_version": 2}, "format version 2; this version of ept reads 1"),
        ({"max_length": "long"}, "max_length is 'long' .str.; it must be int"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"verbalizer": "numbers"}, "unknown verbalizer 'numbers'"),
        ({"task": whole["task"] | {"labels": ["one"]}}, "labels are .'one'.; at least two different ones are needed"),
        ({"task": whole["task"] | {"data": {"file": "rows.csv"}}}, "task.data says where rows come from, which is no part of a record"),
        ({"task": None}, "task is None; it must be a mapping"),
        ({"backbone": {"name": 3}}, "backbone.name is 3"),
        ({"code": "x"}, "unknown parameter 'code'"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=f"task.json.*{message}"):
            read_purpose(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="task.json is missing, which says what the adapter is for"):
        read_purpose(tmp_path)


# ---- pipelines of transformers


def test_a_pipeline_of_transformers_answers_as_the_classifier_does():
    _, clf = in_use(tiny_backbone("llama"), DESK)
    texts = ROWS["desk"]["message"]
    expected = clf(texts)
    for size in (1, 3):
        found = clf.pipeline(batch_size=size)(texts)
        assert [answer["label"] for answer in found] == expected.label.tolist()
        assert [answer["score"] for answer in found] == pytest.approx([max(row.values()) for row in expected.probabilities], abs=1e-4)
    (every,) = clf.pipeline(top_k=None)(texts[:1])
    assert {answer["label"]: answer["score"] for answer in every} == pytest.approx(expected.probabilities[0], abs=1e-4)
    _, pair = in_use(tiny_backbone("t5"), PAIR)
    assert pair.pipeline()({"one": "this", "two": "that"})["label"] == pair({"one": ["this"], "two": ["that"]}).label[0]
    _, numbers = in_use(tiny_backbone("t5"), LIKING)
    with pytest.raises(ValueError, match="a text-classification pipeline serves classification, and task 'liking' is one of regression"):
        numbers.pipeline()


def test_a_pipeline_of_transformers_generates_behind_the_prompt():
    model, clf = in_use(tiny_backbone("llama"), DESK)
    tokenizer = clf.backbone.tokenizer
    write = generation_pipeline(model, tokenizer, do_sample=False, max_new_tokens=5)
    for text, answers in zip(["number 1", "a longer message"], write(["number 1", "a longer message"], batch_size=2, return_full_text=False)):
        new = model.generate(tokenizer(text, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=5)
        assert answers[0]["generated_text"] == tokenizer.decode(new[0], skip_special_tokens=True)
    assert write("number 1")[0]["generated_text"].startswith("number 1")
    with pytest.raises(TypeError, match="use ept.generation_pipeline"):
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    other, _ = in_use(tiny_backbone("t5"), DESK)
    with pytest.raises(ValueError, match="the backbone is encoder-decoder, and text-generation pipelines are for decoder-only ones"):
        generation_pipeline(other, tokenizer)


def test_a_command_whose_reader_has_enough_ends_without_a_word(tmp_path):
    backbone = tiny_backbone("t5")
    in_use(backbone, DESK)[0].save_pretrained(tmp_path)
    write_purpose(tmp_path, Purpose.of(DESK, backbone, 64))
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from ept.use.command_line import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code, "info", str(tmp_path)], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
