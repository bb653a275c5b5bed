"""Metrics equal the reference implementations, and keep their head at the edges."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ept.data.metrics import majority_score, score_task
from ept.data.tasks import TASKS, Task


def draw(seed, labels, n=300):
    rng = np.random.default_rng(seed)
    return rng.integers(labels, size=n), rng.integers(labels, size=n)


@pytest.mark.parametrize("seed", range(3))
def test_classification_equals_scikit_learn(seed):
    predictions, labels = draw(seed, 2)
    scores = score_task("qqp", predictions, labels)
    assert scores["accuracy"] == pytest.approx(100 * sk.accuracy_score(labels, predictions))
    assert scores["f1"] == pytest.approx(100 * sk.f1_score(labels, predictions))
    assert score_task("cola", predictions, labels)["matthews"] == pytest.approx(100 * sk.matthews_corrcoef(labels, predictions))
    predictions, labels = draw(seed, 3)
    assert score_task("cb", predictions, labels)["macro_f1"] == pytest.approx(100 * sk.f1_score(labels, predictions, average="macro"))


@pytest.mark.parametrize("seed", range(3))
def test_correlations_equal_scipy(seed):
    rng = np.random.default_rng(seed)
    predictions, labels = rng.uniform(0, 5, 100), rng.uniform(0, 5, 100).astype(np.float32)
    scores = score_task("stsb", predictions, labels)
    assert scores["pearson"] == pytest.approx(100 * stats.pearsonr(predictions, labels.astype(float)).statistic)
    assert scores["spearman"] == pytest.approx(100 * stats.spearmanr(predictions, labels).statistic)


def test_errors_are_in_the_unit_of_the_labels():
    rent = Task("rent", ["advert"], ["0", "2000"], regression=True)
    rng = np.random.default_rng(0)
    predictions, labels = rng.uniform(0, 2000, 50), rng.uniform(0, 2000, 50)
    scores = score_task(rent, predictions, labels)
    assert list(scores) == ["pearson", "spearman", "mae", "rmse", "n"]
    assert scores["mae"] == pytest.approx(sk.mean_absolute_error(labels, predictions)) and scores["rmse"] == pytest.approx(sk.root_mean_squared_error(labels, predictions))
    assert score_task(rent, predictions / 10, labels / 10)["rmse"] == pytest.approx(scores["rmse"] / 10)
    assert majority_score(rent, labels, labels, metric="rmse") == pytest.approx(labels.std())
    assert majority_score(rent, [100.0, 300.0], [100.0, 250.0], metric="mae") == pytest.approx(75)


def test_multirc_counts_answers_and_questions():
    labels, groups = [1, 0, 1, 0, 1], [4, 4, 4, 9, 9]
    scores = score_task("multirc", [1, 0, 0, 0, 1], labels, groups)
    assert scores["f1"] == pytest.approx(80.0)  # two of three True answers found, none wrongly
    assert (scores["exact_match"], scores["n"], scores["n_groups"]) == (50.0, 5, 2)
    assert score_task("multirc", labels, labels, groups)["exact_match"] == 100.0
    order = [3, 0, 4, 2, 1]  # the rows of a question need not stand together
    mixed = [[column[i] for i in order] for column in ([1, 0, 0, 0, 1], labels, groups)]
    assert score_task("multirc", *mixed) == scores


@pytest.mark.parametrize("name", list(TASKS))
def test_constant_predictions_warn_nobody_and_give_numbers(name):
    task = TASKS[name]
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 40) if task.regression else rng.integers(len(task.labels), size=40)
    for constant in (np.zeros(40), np.ones(40), labels[:1].repeat(40)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = score_task(task, constant, labels, groups=np.arange(40) // 4)
            alone = score_task(task, constant[:1], labels[:1], groups=[0])
        assert next(iter(scores)) == task.score and scores["n"] == 40 and alone["n"] == 1
        assert all(np.isfinite(v) for v in (*scores.values(), *alone.values()))
        for metric in {"matthews", "pearson", "spearman"} & set(scores):
            assert scores[metric] == 0.0


@pytest.mark.parametrize("name", list(TASKS))
def test_perfect_predictions_score_100(name):
    task = TASKS[name]
    labels = np.array([0, 1] * 10) if not task.regression else np.linspace(0, 5, 20)
    scores = score_task(task, labels, labels, groups=np.arange(20))
    assert all(scores[m] == pytest.approx(100.0) for m in task.metrics)


def test_majority_takes_the_constant_from_the_training_labels():
    assert majority_score("rte", [1, 1, 0], [0, 0, 1]) == pytest.approx(100 / 3)
    assert majority_score("multirc", [1, 1, 0], [1, 0]) == pytest.approx(200 / 3)
    assert majority_score("multirc", [1, 1, 0], [1, 1, 0], groups=[0, 0, 1], metric="exact_match") == 50.0
    assert majority_score("cola", [1, 1, 0], [0, 1]) == 0.0
    assert majority_score("stsb", [1.5, 2.5], [1.0, 3.0]) == 0.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: score_task("rte", [], []), "0 predictions for 0 labels of task 'rte'"),
        (lambda: score_task("rte", [0], [0, 1]), "1 predictions for 2 labels"),
        (lambda: score_task("rte", [0.5, 1], [0, 1]), "predictions of task 'rte': row 0 is 0.5; it must be a label number from 0 to 1"),
        (lambda: score_task("rte", [0, 1], [0, -1]), "labels of task 'rte': row 1 is -1"),
        (lambda: score_task("stsb", [0.0, np.nan], [0.0, 1.0]), "row 1 is nan; it must be a finite number"),
        (lambda: score_task("rte", ["yes", "no"], [0, 1]), "must be numbers"),
        (lambda: score_task("multirc", [0, 1], [0, 1]), "needs the column 'question_id'"),
        (lambda: score_task("qnl", [0], [0]), "did you mean 'qnli'?"),
        (lambda: majority_score("rte", [], [0]), "0 training and 1 evaluation labels"),
        (lambda: majority_score("multirc", [0], [0], metric="exact_match"), "needs the column 'question_id'"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_a_users_task_is_scored_like_any_other():
    task = Task("tickets", ["text"], ["a", "b", "c"], ["macro_f1", "accuracy"])
    assert list(score_task(task, [0, 1, 2], [0, 1, 1])) == ["macro_f1", "accuracy", "n"]
