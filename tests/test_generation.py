"""Tasks whose answers are free text: loaded, trained on their tokens, written by the folded prompt, and scored."""

import random
import re

import numpy as np
import pandas as pd
import pytest
import torch

from ept.data.encoding import Encoder
from ept.data.loading import load_task
from ept.data.metrics import majority_score, score_task
from ept.data.task_files import read_task
from ept.data.tasks import METRICS_OF, SPLITS, Task
from ept.data.texts import TEXT_METRICS, text_values
from ept.grid.profiles import load_profile
from ept.methods.registry import build_method
from ept.training.config import TrainingConfig
from ept.training.distillation import share_prompt
from ept.training.evaluation import evaluate
from ept.training.generation import write_answers
from ept.training.training import train
from tests.conftest import byte_tokenizer, perturbed, tiny_backbone

READING = Task("reading", ["question"], generation=True, metrics=["exact_match", "token_f1", "rougeL"], answer_tokens=12, template="{question}", question="{question}\nA:")
SIZES = dict(prompt_length=60, short_length=4, max_length=48)


def rows(n=40):
    return pd.DataFrame([{"question": f"{i} what is {('up', 'down')[i % 2]}?", "Antwort": ("the sky", "a cellar")[i % 2]} for i in range(n)])


@pytest.fixture(scope="module")
def data():
    return load_task(READING, rows(), label="Antwort")


def failure(call, *kinds):
    with pytest.raises(kinds or ValueError) as error:
        call()
    return str(error.value)


# ---- rows and tokens


def test_answers_are_loaded_as_they_stand(data, tmp_path):
    assert [len(data[s]) for s in SPLITS] == [32, 4, 4] and set(data["test"]["label"]) <= {"the sky", "a cellar"}
    rows().to_csv(tmp_path / "r.csv", index=False)
    (tmp_path / "reading.yaml").write_text("fields: [question]\ngeneration: true\nanswer_tokens: 7\ndata: {file: r.csv, label: Antwort}\n")
    task = read_task(tmp_path / "reading.yaml")
    assert (task.kind, task.answer_tokens, task.metrics) == ("generation", 7, ("exact_match", "token_f1"))
    assert load_task(task)["train"]["label"] == data["train"]["label"]
    assert "row 3, column 'Antwort': the text is empty" in failure(lambda: load_task(READING, rows().assign(Antwort=["x"] * 3 + [" "] + ["x"] * 36), label="Antwort"))
    assert "column 'Antwort': ['a'] is a list; it must be one text, number or date" in failure(lambda: load_task(READING, rows().assign(Antwort=[["a"]] * 40), label="Antwort"))


@pytest.mark.parametrize("style", ["fields", "question"])
def test_targets_are_the_tokens_of_the_answer_and_its_end(style):
    tokenizer = byte_tokenizer(eos=style == "fields")
    encoder = Encoder(READING, tokenizer, style)
    short, long = encoder.targets([" sky ", "a text of more than twelve letters"])
    assert tokenizer.decode(short).strip() == "sky</s>" and short.count(1) == 1
    assert len(long) == 12 and 1 not in long, "a text that is cut has no end"


def test_a_task_is_of_one_kind():
    for changes in (dict(labels=["a", "b"]), dict(regression=True), dict(group="day"), dict(answers=["a"])):
        name = next(iter(changes))
        assert f"task 't': {name} is " in failure(lambda changes=changes: Task("t", ["x"], generation=True, **changes)), name
    assert "answer_tokens is 0; it must be a whole number of at least 1" in failure(lambda: Task("t", ["x"], generation=True, answer_tokens=0))
    assert "metric 'accuracy' does not judge generation; take exact_match, token_f1, rouge1" in failure(lambda: Task("t", ["x"], generation=True, metrics=["accuracy"]))
    assert "at least two different ones" in failure(lambda: Task("t", ["x"])), "no labels, and no word of generation"


# ---- scores


def test_values_of_texts():
    assert METRICS_OF["generation"] == TEXT_METRICS
    assert text_values("exact_match", ["The  Mill!", "mills"], ["a mill", "mill"]) == [1, 0]
    assert text_values("token_f1", ["old mill", "", "", "mill mill"], ["the new mill", "x", "", "mill"]) == pytest.approx([0.5, 0, 1, 2 / 3])
    generator = random.Random(0)
    texts = [" ".join(generator.choices(["mill", "bank", "river", "sold"], k=generator.randint(1, 8))) for _ in range(60)]
    shuffled = [" ".join(reversed(text.split())) for text in texts]
    assert text_values("token_f1", texts, shuffled) == [1] * 60, "the order of words does not count"
    for metric in TEXT_METRICS:
        there, back = text_values(metric, texts, texts[::-1]), text_values(metric, texts[::-1], texts)
        assert (there == pytest.approx(back) and all(0 <= value <= 1 for value in there) and text_values(metric, texts, texts) == pytest.approx([1] * 60)) or metric == "rouge2"


def test_rouge_is_that_of_its_package_and_knows_other_alphabets():
    from rouge_score.rouge_scorer import RougeScorer

    one, other = "The mill was sold by the bank.", "The bank sold the old mill, 1907"
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert text_values(kind, [one], [other]) == [RougeScorer([kind]).score(other, one)[kind].fmeasure]
        assert text_values(kind, ["старая мельница стоит"], ["Старая мельница стоит."]) == [1]


def test_a_task_of_texts_is_scored_like_any_other():
    found = score_task(READING, ["The sky", "cellar door"], ["the sky", "a cellar"])
    assert list(found) == ["exact_match", "token_f1", "rougeL", "n"] and found["exact_match"] == 50 and found["token_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert majority_score(READING, ["x", "the sky", "the sky"], ["sky", "a cellar"]) == 50


# ---- training and evaluation


@pytest.mark.parametrize("method", ["ept", "finetune"])
def test_the_whole_road(method, backbone, data, tmp_path):
    training = TrainingConfig(steps=2, batch_size=4, evaluate_every=1)
    run = train(READING, method, 0, backbone, data, output_dir=tmp_path / "a", training=training, sizes=SIZES, progress=False)
    found = evaluate(run.adapter_dir, READING, backbone, data, split="validation")
    assert found.score == run.validation_score and len(found.predictions) == 4 and all(isinstance(text, str) for text in found.predictions)
    assert list(found.metrics) == ["exact_match", "token_f1", "rougeL", "n"] and found.labels == data["validation"]["label"]
    assert repr(found).startswith("reading (validation, n = 4): exact_match ") and "the sky" in found._repr_html_()


def test_the_folded_prompt_writes_the_same(backbone, data):
    model = perturbed(build_method("ept", backbone.model, **SIZES))
    encoder = Encoder(READING, backbone.tokenizer, backbone.style, 48)
    texts = encoder.encode(data["train"].select(range(6)))
    written = write_answers(model, encoder, texts)
    assert written == write_answers(model.fold(), encoder, texts) == write_answers(model, encoder, texts, tokens=1), "folded, or one at a time"
    assert evaluate(model, READING, backbone, {"test": data["train"].select(range(6))}).predictions == written


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_are_learned_with_their_end(kind, data, tmp_path):
    training = TrainingConfig(steps=60, batch_size=8, evaluate_every=60, weight_learning_rate=1e-2)
    torch.manual_seed(0)
    run = train(READING, "finetune", 0, tiny_backbone(kind), data, output_dir=tmp_path / "a", training=training, sizes=SIZES, progress=False)
    losses = run.history["loss"].dropna().tolist()
    found = evaluate(run.adapter_dir, READING, tiny_backbone(kind), data, split="train")
    assert losses[-1] < 0.5 * losses[0]
    assert set(found.predictions) <= {"the sky", "a cellar"} and found.score >= 50, "whole answers, that end where they should"


def test_more_than_a_backbone_has_room_for_is_said():
    backbone = tiny_backbone("gpt2")
    encoder = Encoder(Task("t", ["x"], generation=True, answer_tokens=250), backbone.tokenizer, "question", 48)
    model = build_method("pt", backbone.model, prompt_length=4, short_length=4, max_length=48)
    assert "this backbone has 256 positions" in failure(lambda: write_answers(model, encoder, encoder.encode([{"x": "a"}])))


# ---- what does not serve it says so


def test_what_serves_no_free_text_says_so_in_a_sentence(data, tmp_path):
    backbone = tiny_backbone("t5")
    sentence = "serves classification and regression, and task 'reading' is one of generation; train and evaluate serve every kind"
    assert failure(lambda: Encoder(READING, backbone.tokenizer).candidates) == f"a choice among label texts {sentence}"
    assert sentence in failure(lambda: load_task(READING, rows(), label="Antwort", shots=3))
    source = torch.zeros(4, 32)
    found = failure(lambda: share_prompt({"reading": source}, 0, backbone, {"reading": data}, tmp_path / "s", tasks={"reading": READING}, sizes=SIZES, progress=False))
    assert found == f"share_prompt {sentence}"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "settings.ini").write_text("")
    rows().to_csv(tmp_path / "tasks" / "r.csv", index=False)
    (tmp_path / "tasks" / "reading.yaml").write_text("fields: [question]\ngeneration: true\ndata: {file: r.csv, label: Antwort}\n")
    (tmp_path / "params.yaml").write_text("profile: x\nbackbone: {name: embedded}\ndata: {source: benchmark}\ngrid: {methods: [pt], seeds: [0]}\ntasks: {reading: {}}")
    assert re.search(f"reading.yaml: a grid {sentence}", failure(lambda: load_profile(tmp_path / "params.yaml")))


def test_the_interval_of_texts_lies_around_their_score():
    from ept.training.evaluation import Evaluation

    labels = ["the old mill"] * 40
    answers = ["old mill"] * 20 + ["new mill"] * 20
    for metrics in (("exact_match",), ("token_f1",), ("rougeL",)):
        task = Task("t", ["x"], generation=True, metrics=metrics)
        scores = score_task(task, answers, labels)
        low, high = Evaluation("t", "test", scores, scores[metrics[0]], answers, labels).interval
        assert low < scores[metrics[0]] < high and high - low < 40
    assert np.isnan(Evaluation("t", "test", scores, 0.0, answers[:1], labels[:1]).interval).all()
