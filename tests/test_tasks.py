"""The paper's 13 tasks say what the benchmarks are, and a user's own task is checked before anything trains."""

import dataclasses
import pickle
import string

import pytest

from ept.data.tasks import LISTED, METRICS, STYLES, TASKS, VERBALIZERS, Task, get_task, mark_spans

# fields in the order of the text, labels by number, metrics with the score first, published training examples, halved
TABLE = {
    "mnli": ("premise hypothesis", "entailment neutral contradiction", "accuracy", 392702, False),
    "qqp": ("question1 question2", "not_duplicate duplicate", "accuracy f1", 363846, False),
    "qnli": ("question sentence", "entailment not_entailment", "accuracy", 104743, False),
    "sst2": ("sentence", "negative positive", "accuracy", 67349, False),
    "stsb": ("sentence1 sentence2", " ".join(f"{i // 10}.{i % 10}" for i in range(0, 51, 2)), "pearson spearman", 5749, True),
    "mrpc": ("sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", 3668, True),
    "rte": ("sentence1 sentence2", "entailment not_entailment", "accuracy", 2490, True),
    "cola": ("sentence", "unacceptable acceptable", "matthews", 8551, True),
    "multirc": ("question answer paragraph", "False True", "f1 exact_match", 27243, True),
    "boolq": ("question passage", "False True", "accuracy", 9427, True),
    "wic": ("sentence1 sentence2 word", "False True", "accuracy", 5428, True),
    "wsc": ("text", "False True", "accuracy", 554, True),
    "cb": ("premise hypothesis", "entailment contradiction neutral", "accuracy macro_f1", 250, True),
}


def test_the_papers_13_are_there_in_order():
    assert [name for name in TASKS if name in TABLE] == list(TABLE) and len(TABLE) == 13
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("name", list(TABLE))
def test_a_task_is_its_row_of_the_table(name):
    fields, labels, metrics, train, small = TABLE[name]
    task = TASKS[name]
    assert task.fields == tuple(fields.split())
    assert task.labels == tuple(labels.split())
    assert task.metrics == tuple(metrics.split()) and task.score == task.metrics[0]
    assert task.hub.published_train == train and task.hub.small is small
    assert task.regression is (name == "stsb")
    assert task.hub.config == ("wsc.fixed" if name == "wsc" else name)
    assert len(task.hub.revision) == 40


@pytest.mark.parametrize("name", list(TABLE))
def test_the_listing_is_field_colon_value(name):
    task = TASKS[name]
    row = {field: f"<{field} {{x}}>" for field in task.fields}
    assert task.text(row) == " ".join(f"{field}: <{field} {{x}}>" for field in task.fields)


@pytest.mark.parametrize("name", list(TABLE))
def test_the_question_holds_every_field_and_ends_in_a_cue(name):
    task = TASKS[name]
    row = {field: f"<{field}>" for field in task.fields}
    text = task.text(row, "question")
    assert all(text.count(value) == 1 for value in row.values())
    assert text.endswith("\nAnswer:") and text.endswith(task.cue)
    assert len(task.cue.split()) < 25
    if not task.regression and name != "sst2" and name != "cola":
        assert task.answers != task.words and all(len(word.split()) == 1 for word in task.answers)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("verbalizer", VERBALIZERS)
@pytest.mark.parametrize("name", list(TABLE))
def test_no_label_text_begins_another(name, verbalizer, style):
    texts = TASKS[name].label_texts(verbalizer, style)
    assert len(texts) == len(TASKS[name].labels) == len(set(texts))
    assert not any(a != b and b.startswith(a) for a in texts for b in texts)
    if verbalizer == "digits" and name != "stsb":
        assert texts == tuple(string.digits[: len(texts)])


@pytest.mark.parametrize("style", STYLES)
def test_render_says_where_the_fields_are(style):
    for task in TASKS.values():
        row = {field: f"  {field} of the row " for field in task.fields}
        text, places = task.render(row, style)
        assert text == task.text(row, style)
        assert {field: text[a:b] for field, (a, b) in places.items()} == {field: f"{field} of the row" for field in task.fields}


def test_metrics_in_use_are_known():
    assert {metric for task in TASKS.values() for metric in task.metrics} <= set(METRICS)


def test_tasks_travel_between_processes():
    assert pickle.loads(pickle.dumps(TASKS)) == TASKS


@pytest.mark.parametrize(
    "given, marked",
    [
        (("The cat saw the dog.", "The cat", 0, "the dog", 3), "* The cat * saw # the dog #."),
        (("It was Ann who knew Ann.", "Ann", 2, "It", 0), "# It # was * Ann * who knew Ann."),
        (("They met; then they left.", "they", 3, "They", 0), "# They # met; then * they * left."),
        (("He said that he would.", "he", 9, "He", 0), "# He # said that * he * would."),  # the word's number is wrong
        (("the old men rest", "the old men", 0, "men", 2), "* the old # men # * rest"),
        (("the old men rest", "the old men", 0, "the", 0), "* # the # old men * rest"),
        (("A  wide\ngap (here) stays", "(here)", 3, "A", 0), "# A #  wide\ngap * (here) * stays"),
    ],
)
def test_spans_are_marked(given, marked):
    assert mark_spans(*given) == marked


def make(**changes):
    values = dict(name="t", fields=["a", "b"], labels=["no", "yes"])
    return Task(**{**values, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(fields=[]), "at least one text field"),
        (dict(fields="a"), "it must be a list of names"),
        (dict(labels=["no"]), "at least two different ones"),
        (dict(labels=["no", "no"]), "at least two different ones"),
        (dict(labels=[["no", "not sure"], "yes"]), "labels holds ['no', 'not sure'], a list; each of them must be one text or number"),
        (dict(metrics=["acuracy"]), "unknown metric 'acuracy'; did you mean 'accuracy'?"),
        (dict(metrics=["pearson"]), "metric 'pearson' does not judge classification; take accuracy, f1"),
        (dict(metrics=["accuracy"], regression=True, labels=["0", "1"]), "metric 'accuracy' does not judge regression; take pearson, spearman, mae, rmse"),
        (dict(metrics=["rmse", "pearson"], regression=True, labels=["0", "1"]), "the first metric is 'rmse', of which less is better"),
        (dict(metrics=["pearson"], regression=True), "regression needs numbers as labels"),
        (dict(metrics=["pearson"], regression=True, labels=["2", "1"]), "must rise"),
        (dict(metrics=["exact_match"]), "group=..."),
        (dict(metrics=["f1"], labels=["x", "y", "z"]), "use macro_f1"),
        (dict(template="{a}"), "template uses the fields ['a']; it must use each of ['a', 'b'] once"),
        (dict(template="{a} {b} {c}"), "it must use each of ['a', 'b'] once"),
        (dict(template="{a} {b"), "template is '{a} {b'"),
        (dict(question="{a} {b}"), "must end in an answer cue"),
        (dict(question="{a} {b} Answer: "), "without a space"),
        (dict(words=["x"]), "1 words for 2 labels"),
        (dict(answers=["good", "good"]), "answers has 'good' for two labels"),
        (dict(uncut=["c"]), "unknown field 'c'"),
    ],
)
def test_a_task_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        make(**changes)
    assert message in str(error.value)


def test_a_task_without_metrics_gets_those_of_its_kind():
    assert make().metrics == make(metrics=[]).metrics == ("accuracy",)
    assert make(labels=["0", "1"], regression=True).metrics == ("pearson", "spearman", "mae", "rmse")


@pytest.mark.parametrize("number, listed", [(LISTED, True), (LISTED + 1, False), (150, False)])
def test_a_default_question_lists_as_many_labels_as_one_can_take_in(number, listed):
    task = make(labels=[f"intent {i}" for i in range(number)])
    assert ("intent 7" in task.question) == listed and task.question.startswith("A: {a}\nB: {b}\n") and task.cue.endswith("?\nAnswer:")
    assert len(task.question) < 300


def test_defaults_of_a_users_task():
    task = make(labels=["{odd}", "even"])
    assert task.metrics == ("accuracy",)
    assert task.text({"a": 1, "b": "x"}) == "a: 1 b: x"
    assert task.text({"a": 1, "b": "x"}, "question") == "A: 1\nB: x\nWhich one: {odd} or even?\nAnswer:"
    assert task.cue == "\nWhich one: {odd} or even?\nAnswer:"
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"


def test_get_task_names_the_nearest():
    assert get_task("cola") is TASKS["cola"] and get_task(TASKS["cb"]) is TASKS["cb"]
    with pytest.raises(ValueError, match="unknown task 'mulitrc'; did you mean 'multirc'\\? known tasks: mnli, qqp"):
        get_task("mulitrc")
