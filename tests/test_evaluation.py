"""What an evaluation shows beside its score: a constant answer's, an interval, and which label is taken for which."""

import math

import numpy as np
import pytest

from ept.data.metrics import score_task
from ept.data.tasks import Task
from ept.training.evaluation import Evaluation

DESKS = Task("desk", ["message"], ["billing", "repair", "<other>"], ["accuracy", "macro_f1"])


def evaluation(task, predictions, labels, groups=None, majority=None):
    metrics = score_task(task, predictions, labels, groups)
    return Evaluation(task.name, "test", metrics, metrics[task.score], predictions, labels, () if task.regression else task.labels, majority, groups)


def test_an_evaluation_shows_majority_interval_and_confusion():
    found = evaluation(DESKS, [0, 0, 1, 0, 2], [0, 1, 1, 0, 0], majority=60.0)
    assert found.confusion.loc["billing"].tolist() == [2, 0, 1] and found.confusion.loc["<other>"].tolist() == [0, 0, 0]
    assert found.confusion.to_numpy().sum() == 5 and np.trace(found.confusion) == 3
    assert found.interval[0] < found.score == 60 < found.interval[1]
    low, high = (f"{end:.1f}" for end in found.interval)
    assert repr(found).startswith(f"desk (test, n = 5): accuracy 60.0 (95 % interval {low} to {high}), a constant answer 60.0, macro_f1 ")
    assert len(repr(found).splitlines()) == 6 and "predictions" not in repr(found)
    shown = found._repr_html_()
    assert shown.count("<tr") == 5 and "&lt;other&gt;" in shown and "<other>" not in shown
    assert "constant" not in repr(evaluation(DESKS, [0], [0])), "without training rows there is no constant answer"


def test_the_interval_narrows_with_the_test_set_and_is_none_of_a_single_row():
    widths = [np.ptp(evaluation(DESKS, [0, 1] * n, [0, 0] * n).interval) for n in (5, 50, 500)]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    assert all(math.isnan(end) for end in evaluation(DESKS, [0], [0]).interval) and "interval" not in repr(evaluation(DESKS, [0], [0]))


def test_groups_are_drawn_as_a_whole():
    task = Task("chat", ["body"], ["no", "yes"], ["exact_match", "accuracy"], group="day")
    labels, predictions = [0, 1] * 20, [0, 1, 0, 0] * 10
    found = evaluation(task, predictions, labels, groups=[i // 2 for i in range(40)])
    assert found.score == 50 and found.interval[0] == pytest.approx(30, abs=5) and found.interval[1] == pytest.approx(70, abs=5)


def test_many_labels_show_their_commonest_mistakes():
    task = Task("intents", ["text"], [f"intent {i}" for i in range(50)])
    labels = list(range(50)) * 4
    predictions = [7 if label == 3 else (label + 1) % 50 if label % 10 == 0 and i < 50 else label for i, label in enumerate(labels)]
    lines = repr(evaluation(task, predictions, labels)).splitlines()
    assert len(lines) == 2 + 6 and lines[2].split() == ["0", "intent", "3", "intent", "7", "4"]
    right = evaluation(task, labels, labels)
    assert len(repr(right).splitlines()) == 1 and right.confusion.shape == (50, 50)


def test_numbers_have_an_interval_and_no_confusion():
    task = Task("price", ["advert"], ["0", "1000"], regression=True)
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 1000, 60)
    found = evaluation(task, list(labels + rng.normal(0, 100, 60)), list(labels), majority=0.0)
    assert found.confusion.empty and found.interval[0] < found.score < found.interval[1]
    assert f"mae {found.metrics['mae']:.3g}" in repr(found) and len(repr(found).splitlines()) == 1 and "<table" not in found._repr_html_()
