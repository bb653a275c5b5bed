"""Statistics, marks and gaps of the result tables, and the page that shows them."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ept.data.metrics import score_task
from ept.data.resampling import RESAMPLED, interval, resample, weighted_scores
from ept.data.tasks import TASKS, get_task
from ept.grid.profiles import BackboneChoice, DataChoice, Grid, Paths, Profile, Search, Sweep, load_profile, profile_files
from ept.methods.catalogue import module_of
from ept.methods.registry import METHODS as REGISTRY
from ept.report.contrasts import contrasts
from ept.report.figures import LOOKS, NOTED, look, plot_ablations, plot_comparison, plot_curves, plot_gates, plot_parameters, plot_ranks, plot_sweep, plot_time
from ept.report.learning import ahead, ahead_table, inside, learned, progress, speed, speed_table, stayed
from ept.report.learning_figures import plot_inside
from ept.report.page import ABSENT, FIGURES, findings, protocol, render, write_report
from ept.report.provenance import FORMAT, caveats, present_code, provenance
from ept.report.results import COSTS, ScoreTable, collect, collect_sweep, made_up, publish_costs, read_costs, searched
from ept.report.statistics import degrees_of_freedom, difference, gaps, holm, over_seeds, ranks, seed_weights, wilcoxon
from ept.report.tables import (
    PUBLISHED,
    Cell,
    budget_table,
    comparison_table,
    curves,
    frames,
    overall_table,
    rates_table,
    runs_table,
    score_table,
    summary,
    turned_table,
    write_summary,
)
from ept.utils.fingerprints import code_version

ROOT = Path(__file__).parents[1]
METHODS = ("frozen", "pt", "ept")


def profile(tasks=("cola", "cb"), methods=METHODS, seeds=(0,), name="small"):
    return Profile(
        name,
        BackboneChoice("none"),
        DataChoice("embedded", "data"),
        Grid(tuple(tasks), tuple(methods), tuple(seeds)),
        {},
        {m: {} for m in methods},
        {t: {} for t in tasks},
    )


def write(root, profile, key, right, n=100, metric="accuracy", seconds=10.0, gates=None, constant=False, groups=None, device="cpu", role=None):
    """A run that gets `right` of `n` examples right, with its own measurement of costs."""
    task, _, seed = key.rsplit("-", 2)[0].split("-")[0], None, key.rsplit("-", 1)[1]
    method = key.removeprefix(f"{task}-").removesuffix(f"-{seed}")
    labels = np.arange(n) % 2
    predictions = np.zeros(n, dtype=int) if constant else np.where(np.arange(n) < right, labels, 1 - labels)
    score = float(weighted_scores(metric, predictions, labels, np.ones((1, n)))[0])
    record = {
        "task": task,
        "method": method,
        "role": role or REGISTRY[method].role,
        "seed": int(seed),
        "metric": metric,
        "score": score,
        "majority_score": 50.0,
        "n": n,
        "trainable_parameters": 0 if (role or REGISTRY[method].role) == "reference" else 6400,
        "chosen_step": 20,
        "metrics": {metric: {"value": score, "n": n}},
        "history": {"step": [10, 20], "loss": [1.0, 0.5], "score": [score - 5, score]},
        "gate_weights": gates,
        "backbone": {"revision": None},
        "config": {"sizes": {"short_length": 40, "rank": 20, "spaces": 4}},
    }
    table = pd.DataFrame({"label": labels, "prediction": predictions})
    if groups is not None:
        table["group"] = groups
    paths = Paths(profile, root)
    for kind, text in (("scores", json.dumps(record)), ("predictions", table.to_csv(index_label="index"))):
        file = paths.record(kind, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    measure(root, profile, key, seconds, work=f"{right} {n} {seconds} {device}", device=device)


def measure(root, profile, key, seconds=10.0, work="some work", **more):
    """What the train stage leaves in `runs/`."""
    cost = {
        "train_seconds": seconds,
        "examples_per_second": 40.0,
        "tokens_per_second": 800.5,
        "peak_memory_bytes": 1000,
        "device": "cpu",
        "precision": "float32",
        "processor": "a processor",
        "work": work,
    }
    file = Paths(profile, root).cost(key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(cost | more))
    return file


def read(profile, root):
    publish_costs(profile, root)
    return ScoreTable(profile, collect(profile, root), collect_sweep(profile, root))


# ---- roles ----------------------------------------------------------------------------------------------------------------


def test_committed_records_hold_the_roles_of_their_methods():
    for file in (*ROOT.glob("results/scores/*.json"), *ROOT.glob("profiles/*/results/scores/*.json")):
        record = json.loads(file.read_text())
        assert record["role"] == REGISTRY[record["method"]].role, file.name


# ---- resampling -----------------------------------------------------------------------------------------------------------

TASK_OF = {"accuracy": "sst2", "f1": "multirc", "macro_f1": "cb", "matthews": "cola", "pearson": "stsb", "spearman": "stsb"}


def answers(metric, n=60, runs=2):
    generator = np.random.default_rng(0)
    if metric in ("pearson", "spearman"):
        labels = generator.uniform(0, 5, n).round(1)
        return labels, [np.clip(labels + generator.normal(0, 1.5, n), 0, 5) for _ in range(runs)]
    labels = generator.integers(0, 3 if metric == "macro_f1" else 2, n)
    return labels, [np.where(generator.random(n) < 0.7, labels, generator.permutation(labels)) for _ in range(runs)]


@pytest.mark.parametrize("metric", RESAMPLED)
def test_weighted_score_is_the_score_of_repeated_rows(metric):
    """A row of weight 2 counts as two rows, one of weight 0 not at all; the evaluation's own metrics are the reference."""
    labels, (predictions, _) = answers(metric)
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=20)
    found = weighted_scores(metric, predictions, labels, weights)
    for value, weight in zip(found, weights):
        rows = np.repeat(np.arange(60), weight)
        assert value == pytest.approx(score_task(TASK_OF[metric], predictions[rows], labels[rows], groups=rows)[metric], abs=1e-8)


@pytest.mark.parametrize("metric", RESAMPLED)
def test_constant_answers_are_no_error(metric):
    labels, _ = answers(metric)
    found = weighted_scores(metric, np.ones(60), labels, np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=20))
    assert np.isfinite(found).all()
    if metric in ("matthews", "pearson", "spearman"):
        assert (found == 0).all()


def test_all_runs_are_scored_on_the_same_draws():
    labels, (first, _) = answers("accuracy")
    drawn = resample("accuracy", [first, first, 1 - first], labels, draws=200)
    assert np.array_equal(drawn[0], drawn[1]) and np.allclose(drawn[0] + drawn[2], 100)
    assert np.array_equal(drawn, resample("accuracy", [first, first, 1 - first], labels, draws=200))
    assert not np.array_equal(drawn, resample("accuracy", [first, first, 1 - first], labels, draws=200, seed="another task"))


def test_rows_of_a_group_are_drawn_together():
    """Answers that agree within their question: the interval of 25 questions, not of 100 answers."""
    generator = np.random.default_rng(0)
    right = np.repeat(generator.random(25) < 0.6, 4)
    grouped = resample("accuracy", [right], np.ones(100), groups=np.repeat(np.arange(25), 4))[0]
    single = resample("accuracy", [right], np.ones(100))[0]
    assert grouped.std() == pytest.approx(2 * single.std(), rel=0.1)
    assert len(np.unique(grouped.round(6))) <= 26


@pytest.mark.parametrize("n", [139, 872])
def test_interval_of_accuracy_agrees_with_wilsons(n):
    right = int(0.8 * n)
    found = interval("accuracy", resample("accuracy", [np.arange(n) < right], np.ones(n))[0], n)
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(found, (100 * expected.low, 100 * expected.high), atol=2.0 if n < 200 else 0.6)


def test_interval_of_correlation_agrees_with_fishers():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=300)
    predictions = labels + generator.normal(size=300)
    expected = stats.pearsonr(predictions, labels).confidence_interval()
    found = interval("pearson", resample("pearson", [predictions], labels)[0], 300)
    np.testing.assert_allclose(found, (100 * expected.low, 100 * expected.high), atol=3.0)


@pytest.mark.parametrize("right", [0, 28])
def test_where_the_bootstrap_says_nothing_an_accuracy_has_wilsons_interval(right):
    found = interval("accuracy", resample("accuracy", [np.arange(28) < right], np.ones(28))[0], 28)
    expected = stats.binomtest(right, 28).proportion_ci(method="wilson")
    np.testing.assert_allclose(found, (100 * expected.low, 100 * expected.high), atol=1e-9)
    assert found[1] - found[0] > 10


@pytest.mark.parametrize(("metric", "n"), [("pearson", 20), ("matthews", 20), ("accuracy", 1)])
def test_no_interval_rather_than_a_wrong_one(metric, n):
    assert all(math.isnan(v) for v in interval(metric, resample(metric, [np.ones(n)], np.arange(n) % 2)[0], n))


# ---- tests ----------------------------------------------------------------------------------------------------------------


def test_paired_bootstrap_agrees_with_mcnemar():
    """Two classifiers on the same rows: the p value is near that of the exact test of the rows they disagree on."""
    both, first, second = 120, 22, 8
    a, b = np.ones(160), np.ones(160)
    a[both : both + second], b[both + second : both + second + first] = 0, 0
    a[150:], b[150:] = 0, 0
    drawn = resample("accuracy", [a, b], np.ones(160))
    found = difference(100 * (a.mean() - b.mean()), drawn[0] - drawn[1])
    assert found.verdict == "win" and found.p == pytest.approx(stats.binomtest(second, first + second).pvalue, abs=0.015)


def test_a_handful_of_examples_proves_nothing(tmp_path):
    """Five of three hundred answered differently, all in favour of one: the bootstrap alone would call it."""
    p = profile(tasks=("qqp",), methods=("pt", "ept"))
    for right, verdict in ((205, "tie"), (215, "win")):
        write(tmp_path, p, "qqp-pt-0", 200, n=300)
        write(tmp_path, p, "qqp-ept-0", right, n=300)
        found = read(p, tmp_path).difference("ept", "pt")
        assert found.low > 0 and found.verdict == verdict
    assert difference(1.0, np.ones(1000), differing=5).p == stats.binomtest(5, 5).pvalue


def test_interval_and_p_of_a_difference_say_the_same():
    generator = np.random.default_rng(0)
    for _ in range(40):
        labels = np.ones(80)
        drawn = resample("accuracy", [generator.random(80) < 0.75, generator.random(80) < 0.65], labels, draws=1000)
        found = difference(0.0, drawn[0] - drawn[1])
        if found.verdict != "tie":
            assert found.p < 0.06
        else:
            assert found.p > 0.04


def test_under_no_difference_one_in_twenty_is_called():
    """Two equal methods, 300 test sets: about 5 % of the paired intervals miss zero."""
    generator, called = np.random.default_rng(0), 0
    for _ in range(300):
        drawn = resample("accuracy", generator.random((2, 150)) < 0.7, np.ones(150), draws=400)
        called += difference(0.0, drawn[0] - drawn[1]).verdict != "tie"
    assert 3 <= called <= 30


def test_wilcoxon_is_scipys_with_equal_pairs_left_out():
    values = [3.0, -1.0, 0.0, 2.5, 4.0, 0.5, 6.0]
    assert wilcoxon(values) == pytest.approx(stats.wilcoxon([v for v in values if v]).pvalue)
    assert wilcoxon([0.0]) == 1.0 and math.isnan(wilcoxon([])) and wilcoxon([5.0]) == 1.0


def test_holm_is_holms():
    p = np.array([0.001, 0.2, 0.012, math.nan, 0.04])
    found = holm(p)
    ordered, expected = np.sort(p[~np.isnan(p)]), []
    for i, value in enumerate(ordered):
        expected.append(min(1.0, max([*expected, (4 - i) * value])))
    np.testing.assert_allclose(np.sort(found[~np.isnan(found)]), expected)
    assert np.isnan(found[3]) and (found[~np.isnan(found)] >= p[~np.isnan(p)]).all()


def test_ranks_and_gaps():
    scores = pd.DataFrame({"a": [90.0, 80.0, math.nan], "b": [85.0, 80.0, 70.0], "c": [95.0, 60.0, 75.0]})
    assert ranks(scores).to_numpy().tolist() == [[2, 3, 1], [1.5, 1.5, 3]], "a task with a gap is left out, equal scores share a rank"
    assert gaps(scores).max().tolist() == [5.0, 10.0, 20.0]


# ---- the table ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    p = profile()
    write(tmp_path, p, "cola-frozen-0", 50, constant=True, seconds=0.0)
    write(tmp_path, p, "cola-pt-0", 70, seconds=20.0)
    write(tmp_path, p, "cola-ept-0", 95, seconds=10.0, gates=[[0.4, 0.6], [0.5, 0.5]])
    write(tmp_path, p, "cb-pt-0", 80, seconds=30.0)
    write(tmp_path, p, "cb-ept-0", 84, seconds=15.0, gates=[[0.4, 0.6], [0.5, 0.5]])
    return p, tmp_path


@pytest.fixture
def few_figures(monkeypatch):
    """Reports have two figures: drawing all of them takes most of a report's time, and is asked of other tests."""
    figures = {name: (*words, plot if name in ("scores", "time") else lambda table: None) for name, (*words, plot) in FIGURES.items()}
    monkeypatch.setattr("ept.report.page.FIGURES", figures)


def line(text, name):
    return next(row for row in text.splitlines() if row.startswith(f"| {name} |"))


def test_a_missing_cell_says_so_and_is_counted(filled):
    text = score_table(read(*filled)).markdown()
    row = line(text, "cb")
    assert row.split("|")[5].strip() == "missing" and "80.0" in row and "84.0" in row
    assert "5 of 6 runs" in text and "Missing: 1 run in 1 of 6 cells." in text
    assert line(text, "mean").split("|")[5].strip() == "missing", "no mean over a column with a gap"
    assert "5 of 6 runs of the grid are there" in " ".join(findings(read(*filled)))


def test_only_a_lead_beyond_the_paired_interval_is_bold(tmp_path):
    p = profile(tasks=("cola", "cb"), methods=("pt", "ept"))
    write(tmp_path, p, "cola-pt-0", 70)
    write(tmp_path, p, "cola-ept-0", 95)
    write(tmp_path, p, "cb-pt-0", 80)
    write(tmp_path, p, "cb-ept-0", 82)
    text = score_table(read(p, tmp_path)).markdown()
    assert "**95.0**" in text and "*70.0*" not in text
    assert "*80.0*" in text and "*82.0*" in text and "**82.0**" not in text, "two points on a hundred examples are not a difference"


def test_answering_always_the_same_is_marked(filled):
    table = read(*filled)
    text = score_table(table).markdown()
    assert re.search(r"50\.0 \([\d.]+ to [\d.]+\) †", text)
    assert text.count("†") == 2, "one run, and the caption that explains the sign"
    assert "answering the same to every example" in " ".join(findings(table))


def test_a_score_near_the_majority_is_marked(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"))
    write(tmp_path, p, "cola-pt-0", 53)
    write(tmp_path, p, "cola-ept-0", 95)
    text = score_table(read(p, tmp_path)).markdown()
    assert re.search(r"53\.0 \([^)]+\) ‡", text) and text.count("‡") == 2


def test_a_constant_answer_may_beat_the_majority(tmp_path):
    """F1 of answering True throughout: the floor is not what the record calls the majority score."""
    p = profile(tasks=("multirc",), methods=("pt",))
    write(tmp_path, p, "multirc-pt-0", 60, metric="f1")
    file = Paths(p, tmp_path).record("scores", "multirc-pt-0")
    file.write_text(file.read_text().replace('"majority_score": 50.0', '"majority_score": 0.0'))
    table = read(p, tmp_path)
    assert table.cells["floor"].item() == pytest.approx(100 * 2 / 3) and table.cells["near_floor"].item()
    assert "Best constant answer above the majority score: multirc 66.7" in score_table(table).caption


def test_time_is_relative_to_prompt_tuning(filled):
    table = read(*filled)
    overall = table.overall().set_index("method")["time_of_pt"]
    assert overall["pt"] == 1 and overall["ept"] == 0.5
    cells = table.cells.set_index(["task", "method"])["time_of_pt"]
    assert cells["cola", "ept"] == 0.5 and cells["cb", "ept"] == 0.5
    assert "Training took `ept` 0.50 of the time of `pt`, wall-clock" in " ".join(findings(table))


def test_times_of_different_machines_are_not_compared(filled):
    p, root = filled
    for task in ("cola", "cb"):
        write(root, p, f"{task}-ept-0", 90, device="cuda")
    assert math.isnan(read(p, root).overall().set_index("method")["time_of_pt"]["ept"])


def test_several_seeds_give_mean_deviation_and_a_joint_interval(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"), seeds=(0, 1, 2))
    for seed, (pt, ept) in enumerate([(70, 90), (72, 92), (74, 94)]):
        write(tmp_path, p, f"cola-pt-{seed}", pt)
        write(tmp_path, p, f"cola-ept-{seed}", ept)
    table = read(p, tmp_path)
    text = score_table(table).markdown()
    assert re.search(r"\| 72\.0 ± 2\.0 \([\d.]+ to [\d.]+\) \| \*\*92\.0\*\* ± 2\.0 \(", text) and "seeds 0, 1, 2" in text
    cell = table.cell("cola", "pt")
    single = interval("accuracy", table.drawn["cola", "pt", 0], 100)
    assert cell["high"] - cell["low"] > 0.9 * (single[1] - single[0]), "three seeds do not make the test set larger"
    assert table.compare().iloc[0][["tasks", "pairs"]].tolist() == [1, 3]


def test_differences_are_over_shared_seeds(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"), seeds=(0, 1))
    write(tmp_path, p, "cola-pt-0", 70)
    write(tmp_path, p, "cola-ept-0", 80)
    write(tmp_path, p, "cola-ept-1", 100)
    table = read(p, tmp_path)
    assert table.difference("ept", "pt").value == pytest.approx(10) and table.cell("cola", "ept")["score"] == 90
    assert "1 seed missing" in score_table(table).markdown()


def test_one_run_of_several_proves_nothing(tmp_path):
    """Where one seed of two is there, how far runs lie apart is not known: no interval, no win, no lead, and none of its kind narrows another's."""
    p = profile(tasks=("cola", "cb"), methods=("pt", "ept"), seeds=(0, 1))
    for key, right in (("cola-pt-0", 60), ("cola-ept-0", 99), ("cb-pt-0", 60), ("cb-pt-1", 60), ("cb-ept-0", 95), ("cb-ept-1", 96)):
        write(tmp_path, p, key, right)
    table = read(p, tmp_path)
    alone = table.difference("ept", "pt", ["cola"])
    assert alone.value == pytest.approx(39) and math.isnan(alone.p) and alone.verdict == ""
    assert math.isnan(table.cell("cola", "ept")["low"]) and table.cells.query("task == 'cola'")["best"].tolist() == ["", ""]
    both, cb = table.difference("ept", "pt"), table.difference("ept", "pt", ["cb"])
    assert both == cb and cb.verdict == "win" and table.cell("cb", "ept")["best"] == "best"
    assert table.compare().iloc[0][["tasks", "pairs", "wins"]].tolist() == [1, 2, 1] and table.differences()["task"].tolist() == ["cb"]
    assert summary(table)["ept"].keys() == {"cola", "cb"} and "mean" in summary(read(replace(p, grid=replace(p.grid, seeds=(0,))), tmp_path))["ept"]


def test_a_method_that_is_not_yet_compared_is_not_tested():
    """A method with less than half of the fullest one's runs is in no test, and does not make the tests of others stricter."""
    gone = tuple(f"{task}-mpt-{seed}" for task in ("sst2", "stsb", "multirc") for seed in (0, 1))
    methods = ("frozen", "pt", "dept", "mpt", "ept")
    table = made_up(methods=methods, missing=gone)
    kept = replace(table.profile, grid=replace(table.profile.grid, methods=methods[:3] + methods[4:]))
    fewer = ScoreTable(kept, table.runs[table.runs["method"] != "mpt"])
    assert "mpt" not in table.compare()["method"].tolist() and "mpt" in table.differences()["method"].tolist()
    same = ["method", "bootstrap_holm", "wilcoxon_holm", "wilcoxon_tasks_holm"]
    assert table.compare()[same].equals(fewer.compare()[same])
    assert "Not yet compared, for they have fewer than half the runs of the fullest: mpt" in score_table(table).caption


def test_multirc_is_drawn_by_question_if_the_records_say_so(tmp_path):
    p = profile(tasks=("multirc",), methods=("pt", "ept"))
    for method in ("pt", "ept"):
        write(tmp_path, p, f"multirc-{method}-0", 80, groups=np.arange(100) // 5)
    table = read(p, tmp_path)
    assert len(np.unique(table.runs["groups"].iloc[0])) == 20 and "too narrow" not in score_table(table).caption
    for method in ("pt", "ept"):
        write(tmp_path, p, f"multirc-{method}-0", 80)
    old = read(p, tmp_path)
    assert "too narrow" in score_table(old).caption and "Grouping" in dict(protocol(old))
    width = lambda t: t.cell("multirc", "pt")["high"] - t.cell("multirc", "pt")["low"]
    assert width(table) > 1.3 * width(old)


def test_runs_on_other_rows_are_refused(filled):
    p, root = filled
    write(root, p, "cb-ept-0", 40, n=50)
    with pytest.raises(ValueError, match="cb-ept-0 was scored on other rows than cb-pt-0; evaluate the runs of cb again"):
        read(p, root)


def test_methods_with_dashes_are_found(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept-no-fusion"))
    write(tmp_path, p, "cola-ept-no-fusion-0", 90)
    runs = collect(p, tmp_path)
    assert runs.dropna(subset="score")["method"].tolist() == ["ept-no-fusion"]


def test_nothing_at_all_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the grid first .make reproduce PROFILE=small."):
        collect(profile(), tmp_path)


def test_the_embedded_table_says_what_it_is_not(tmp_path):
    p = profile(name="embedded")
    write(tmp_path, p, "cola-pt-0", 70)
    table = read(p, tmp_path)
    for text in (score_table(table).markdown(), score_table(table).html(), turned_table(table).latex()):
        assert "embedded: proves the machinery, says nothing about English" in text
    assert "made-up data" in findings(table)[0]


@pytest.mark.parametrize("source", ["embedded", "benchmark"])
def test_what_a_profile_says_of_itself_does_not_hang_on_its_name(source, tmp_path, few_figures):
    """A copy under another name says the same true things: whether its data are made up, and published scores beside real rows."""
    reports = {}
    for name in ("embedded-confirmation", "smollm2-plain", "a-copy"):
        p = replace(profile(tasks=("cola", "cb"), name=name), data=DataChoice(source, "data" if source == "embedded" else None))
        for key, right in (("cola-frozen-0", 50), ("cola-pt-0", 70), ("cola-ept-0", 95), ("cb-pt-0", 80), ("cb-ept-0", 84)):
            write(tmp_path / name, p, key, right)
        table = read(p, tmp_path / name)
        write_report(table, tmp_path / name / "report")
        texts = {f.name: f.read_text() for f in (tmp_path / name / "report").rglob("*") if f.is_file()}
        texts |= {"findings": " ".join(findings(table)), "columns": " ".join(score_table(table).columns)}
        reports[name] = {file: text.replace(name, "NAME") for file, text in texts.items()}
    assert reports["embedded-confirmation"] == reports["a-copy"] == reports["smollm2-plain"]
    made_up_data, found = source == "embedded", reports["a-copy"]
    for file in ("report.html", "table.md", "scores.tex"):
        assert ("NAME: proves the machinery, says nothing about English" in found[file]) == made_up_data
        assert ("63.79" in found[file]) != made_up_data
    assert ("made-up data" in found["findings"]) == made_up_data and ("published" in found["columns"]) != made_up_data


OWN = {name: replace(get_task("sst2"), name=name) for name in ("reviews", "mails")}
PAPER = r"(?i)\babstract\b|12\.9 %|14 %|made[- ]up|says nothing|published"


def test_beside_tasks_of_ones_own_stands_no_word_of_the_paper(tmp_path):
    """Nor of made-up rows or published scores; the paper says nothing of such tasks."""
    table = made_up(tasks=("reviews", "mails"), own=OWN, source="own", name="mine")
    table = ScoreTable(table.profile, table.runs.assign(processor="a processor"), table.sweep)
    write_report(table, tmp_path)
    texts = [*findings(table), (tmp_path / "table.md").read_text(), *(f.read_text() for f in tmp_path.glob("tables/*"))]
    texts.append(re.sub(r"(?s)<(style|script)>.*?</\1>", "", (tmp_path / "report.html").read_text()))
    assert [text for text in texts if re.search(PAPER, text)] == []
    assert "own data" in texts[-1] and "of the time of `pt`" in " ".join(findings(table)), "the sentences are there, without the claims"


@pytest.mark.parametrize("source", ["embedded", "benchmark"])
def test_in_a_mixed_grid_only_the_tasks_that_it_is_true_of_are_named(source):
    """`cola` under this name may be a task of one's own; then it has no published score."""
    own = OWN | {"cola": replace(get_task("cola"))}
    table = made_up(tasks=("sst2", "reviews", "cola"), own=own, source=source, name="mixed")
    text, rows = " ".join(findings(table)), score_table(table)
    assert f"{source} and own data" in rows.caption
    assert ("Made-up data: sst2." in text) == ("the rows of sst2 are made up" in rows.caption) == (source == "embedded")
    if source == "benchmark":
        assert [row[-1].value for row in rows.rows[:3]] == ["94.15", "", ""]
        assert [cell.value for cell in turned_table(table).rows[-1][3:6]] == ["94.15", "", ""]
    else:
        assert "published" not in " ".join(rows.columns)


def test_a_method_under_another_name_keeps_its_role(tmp_path):
    """Ranking, families of comparisons and sentences about the proposed method follow what the records say, not the name."""
    names = {"frozen": "asis", "pt": "pt", "dept": "dept", "ept-no-fusion": "novel-no-fusion", "ept": "novel"}
    found = []
    for called in ({m: m for m in names}, names):
        root = tmp_path / called["ept"]
        p = replace(profile(methods=tuple(called.values())), sweep=Sweep())
        for method, right in zip(names, (50, 70, 80, 75, 95)):
            for task in ("cola", "cb"):
                gates = [[0.4, 0.6], [0.5, 0.5]] if method == "ept" else None
                write(root, p, f"{task}-{called[method]}-0", right, role=REGISTRY[method].role, constant=method == "frozen", gates=gates)
        table = read(p, root)
        drawn = write_report(table, root / "report")
        compared, overall = table.compare(), table.overall()
        text = "\n".join([*findings(table), (root / "report" / "table.md").read_text(), comparison_table(table).html()])
        for new, old in {called["ept"]: "ept", called["frozen"]: "frozen"}.items():
            text = re.sub(rf"(?<![\w-]){new}(?![\w])", old, text)
        back = {new: old for old, new in called.items()}
        found.append((text, [back[m] for m in table.contenders], compared["role"].tolist(), overall["role"].tolist(), list(drawn), list(frames(table))))
    assert found[0] == found[1]
    assert found[1][1:4] == (["pt", "dept", "ept"], ["reference", "comparison", "comparison", "ablation"], ["reference", "comparison", "comparison", "ablation", "proposed"])
    assert {"ablations", "comparison", "gates"} <= set(found[1][4])


def test_made_up_methods_have_the_roles_of_the_real_ones():
    assert made_up(methods=tuple(REGISTRY), tasks=("cola",), seeds=(0,)).roles == {name: method.role for name, method in REGISTRY.items()}


def test_a_method_without_records_has_no_role_and_is_in_no_ranking(filled, few_figures):
    p, root = filled
    for task in ("cola", "cb"):
        Paths(p, root).record("scores", f"{task}-ept-0").unlink()
    table = read(p, root)
    assert table.roles == {"frozen": "reference", "pt": "comparison", "ept": None} and table.proposed is None and table.contenders == ["pt"]
    assert table.compare().empty and table.differences().empty and comparison_table(table) is None
    assert "missing" in score_table(table).markdown() and write_report(table, root / "report")


def test_a_record_that_says_no_role_or_another_is_refused(filled):
    p, root = filled
    file = Paths(p, root).record("scores", "cb-ept-0")
    record = json.loads(file.read_text())
    for role, text in ((None, "cb-ept-0.*no role.*evaluate"), ("comparison", "'ept'.*comparison and proposed.*evaluate")):
        file.write_text(json.dumps({**{k: v for k, v in record.items() if k != "role"}, **({"role": role} if role else {})}))
        with pytest.raises(ValueError, match=text):
            read(p, root)


def test_reports_know_no_list_of_methods():
    """A report is made from records alone; nothing it is made of imports the methods, at any depth of a function. Where their code lies, provenance may ask."""
    for module in ("statistics", "results", "provenance", "tables", "figures", "descriptions", "page"):
        text = (ROOT / "ept" / "report" / f"{module}.py").read_text()
        if module == "provenance":
            text = text.replace("from ..methods.catalogue import module_of\n", "")
        assert not re.search(r"import.*\bmethods\b|ept\.methods|\.methods(\.\w+)? import", text), module


# ---- costs ----------------------------------------------------------------------------------------------------------------


def test_a_cost_of_the_same_work_stays_as_it_was_published(tmp_path):
    p = profile(methods=("pt", "ept"))
    measure(tmp_path, p, "cola-pt-0", 20.0004, "a"), measure(tmp_path, p, "cola-ept-0", 10.0, "b")
    assert publish_costs(p, tmp_path) == ["cola-pt-0", "cola-ept-0"]
    file = Paths(p, tmp_path).results / "costs.csv"
    first, written = file.read_text(), file.stat().st_mtime_ns
    assert first.splitlines() == [",".join(COSTS), "cola,pt,0,,20.0,40.0,800.5,1000,cpu,float32,a processor,a", "cola,ept,0,,10.0,40.0,800.5,1000,cpu,float32,a processor,b"]
    measure(tmp_path, p, "cola-pt-0", 33.0, "a", processor="another"), measure(tmp_path, p, "cola-ept-0", 44.0, "b")
    assert publish_costs(p, tmp_path) == [] and file.read_text() == first and file.stat().st_mtime_ns == written, "nothing is written where nothing is new"
    measure(tmp_path, p, "cola-ept-0", 44.0, "other work")
    assert publish_costs(p, tmp_path) == ["cola-ept-0"]
    assert read_costs(p, tmp_path)["train_seconds"].to_dict() == {"cola-pt-0": "20.0", "cola-ept-0": "44.0"}
    assert publish_costs(p, tmp_path, replace=True) == ["cola-pt-0", "cola-ept-0"]
    assert read_costs(p, tmp_path).loc["cola-pt-0", ["train_seconds", "processor"]].tolist() == ["33.0", "another"]


def test_a_cost_of_unknown_work_is_replaced_by_a_measurement_only(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"))
    file = Paths(p, tmp_path).results / "costs.csv"
    file.parent.mkdir(parents=True)
    file.write_text(",".join(COSTS) + "\ncola,pt,0,,20.125,40,800,1000,cpu,float32,,\ncola,ept,0,,10.125,40,800,1000,cpu,float32,,\n")
    before = file.read_text()
    assert publish_costs(p, tmp_path) == [] and file.read_text() == before
    measure(tmp_path, p, "cola-ept-0", 9.0, "b")
    assert publish_costs(p, tmp_path) == ["cola-ept-0"] and publish_costs(p, tmp_path) == []
    assert read_costs(p, tmp_path)[["train_seconds", "work"]].to_numpy().tolist() == [["20.125", ""], ["9.0", "b"]]


def test_costs_stand_in_the_order_of_the_grid_then_of_the_sweep_and_no_others(tmp_path):
    p = replace(profile(tasks=("cola", "cb"), methods=("pt", "ept"), seeds=(0, 1)), sweep=Sweep(("cola",), (1,), ("rank-5", "spaces-1")))
    keys = [plan.key for plan in (*p.runs(), *p.sweep_runs())]
    for key in reversed(keys):
        measure(tmp_path, p, key)
    measure(tmp_path, p, "rte-pt-0"), measure(tmp_path, p, "cola-ept-1-rank-7")
    assert publish_costs(p, tmp_path) == keys == read_costs(p, tmp_path).index.tolist()
    assert read_costs(p, tmp_path).loc["cola-ept-1-rank-5", ["method", "seed", "size"]].tolist() == ["ept", "1", "rank-5"]
    smaller = replace(p, grid=replace(p.grid, tasks=("cola",), seeds=(1,)), sweep=Sweep())
    assert publish_costs(smaller, tmp_path) == [] and read_costs(p, tmp_path).index.tolist() == ["cola-pt-1", "cola-ept-1"], "runs that are no longer there are dropped"


def test_nothing_measured_is_an_empty_table(tmp_path):
    """The report stage promises DVC a table."""
    assert publish_costs(profile(), tmp_path) == [] and (Paths(profile(), tmp_path).results / "costs.csv").read_text() == ",".join(COSTS) + "\n"
    assert read_costs(profile(), tmp_path).empty and publish_costs(profile(), tmp_path) == []


def test_a_measurement_that_lacks_something_is_refused(tmp_path):
    file = measure(tmp_path, profile(), "cola-pt-0")
    file.write_text(file.read_text().replace('"work"', '"other"'))
    with pytest.raises(ValueError, match=r"cola-pt-0.json has no 'work'; train the run again .make reproduce."):
        publish_costs(profile(), tmp_path)


def test_a_report_takes_costs_from_the_published_table_only(filled):
    p, root = filled
    assert collect(p, root)["train_seconds"].max() == 0, "nothing is published yet, and `frozen` takes no time"
    assert "No run that trains was timed" in score_table(ScoreTable(p, collect(p, root))).markdown()
    assert read(p, root).runs["train_seconds"].notna().sum() == 5
    for file in (Paths(p, root).runs / "costs").glob("*.json"):
        file.unlink()
    assert read(p, root).runs["train_seconds"].notna().sum() == 5, "another clone has the table and no measurements"


def test_what_trains_nothing_needs_no_measurement(filled):
    p, root = filled
    Paths(p, root).cost("cola-frozen-0").unlink()
    runs = read(p, root).runs.set_index(["task", "method"])["train_seconds"]
    assert runs["cola", "frozen"] == 0 and math.isnan(runs["cb", "frozen"]), "the one is there, the other is missing"


def test_a_report_says_what_its_times_were_measured_on(filled):
    p, root = filled
    assert "measured on: a processor (cpu, float32)." in score_table(read(p, root)).markdown()
    measure(root, p, "cola-ept-0", 5.0, "again", processor="another, faster")
    assert "of the time of `pt` (1 run of each), wall-clock, each pair of runs on one kind of machine" in " ".join(findings(read(p, root)))
    measure(root, p, "cb-ept-0", 5.0, "again", processor="another, faster")
    table = read(p, root)
    assert "measured on: a processor (cpu, float32), 2 runs; another, faster (cpu, float32), 2 runs." in dict(protocol(table))["Times"]
    measure(root, p, "cb-pt-0", None, "again", processor="beside other work")
    hardware = dict(provenance(read(p, root)))["Hardware"]
    assert "beside other work (cpu, float32), 1 run" in hardware and "first measured" in hardware, "what was not timed has run somewhere, too"
    assert math.isnan(table.overall().set_index("method")["time_of_pt"]["ept"]), "seconds of different processors are not compared"


def test_other_seconds_for_the_same_work_change_no_file(filled, few_figures):
    """A run that is made again takes other seconds; everything that git keeps stays the same, byte for byte."""
    p, root = filled
    kept = []
    for seconds in (None, 123.4):
        for file in (Paths(p, root).runs / "costs").glob("*.json") if seconds else ():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"train_seconds": seconds, "tokens_per_second": 1.0, "peak_memory_bytes": 2}))
        table = read(p, root)
        write_report(table, Paths(p, root).report)
        write_summary(table, Paths(p, root).results)
        kept.append({file.relative_to(root): file.read_bytes() for file in (root / "results").rglob("*") if file.is_file()})
    assert kept[0] == kept[1] and len(kept[0]) > 20


@pytest.mark.parametrize("file", [f for f in profile_files(ROOT).values() if (f.parent / "results" / "summary.json").exists()], ids=lambda f: f.parent.name)
def test_committed_costs_are_those_of_the_committed_records(file):
    p = load_profile(file)
    trained = [plan.key for plan in (*p.runs(), *p.sweep_runs()) if plan.method not in p.grid.references]
    assert read_costs(p).index.tolist() == [key for key in trained if Paths(p).record("scores", key).exists()]
    assert not (Paths(p).results / "costs").exists()


# ---- comparisons ----------------------------------------------------------------------------------------------------------

FULL = tuple(m for m in LOOKS)


@pytest.fixture(scope="module")
def large():
    return made_up(tasks=tuple(TASKS), methods=FULL, missing=("cb-pt-1", "rte-lora-0", "rte-lora-1"))


def test_comparisons_are_corrected_for_eleven(large):
    found = large.compare()
    eleven = found[found["role"] == "comparison"]
    assert len(eleven) == 11 and set(found["role"]) == {"comparison", "ablation", "reference"}
    for name in ("bootstrap", "wilcoxon", "wilcoxon_tasks"):
        np.testing.assert_allclose(eleven[f"{name}_holm"], holm(eleven[f"{name}_p"]))
        smallest = eleven[f"{name}_p"].min()
        assert eleven[f"{name}_holm"].min() == pytest.approx(min(1, 11 * smallest))


def test_wins_ties_and_losses_are_those_of_the_paired_intervals(large):
    each, found = large.differences(), large.compare().set_index("method")
    for method, part in each.groupby("method"):
        inside = (part["low"] <= 0) & (part["high"] >= 0) | (part["p"] > 0.05)
        assert found.loc[method, "ties"] == inside.sum()
        assert found.loc[method, ["wins", "ties", "losses"]].sum() == found.loc[method, "tasks"] == len(part)
    assert found.loc["lora", "tasks"] == 12 and found.loc["pt", "pairs"] == 24, "of cb they share one seed of two"


def test_consistency_is_among_ept_and_the_comparison_methods(large):
    found, scores = large.overall().set_index("method"), large.scores(large.contenders).dropna()
    assert len(large.contenders) == 12 and len(scores) == 12 and large.common == [t for t in TASKS if t != "rte"]
    assert found["rank"].dropna().mean() == pytest.approx(6.5)
    assert found.loc["pt", "worst_gap"] == pytest.approx((scores.max(axis=1) - scores["pt"]).max())
    assert found.loc[["frozen", "ept-one-space"], ["rank", "worst_gap"]].isna().all().all()


def test_one_task_is_named_in_the_singular():
    table = made_up(tasks=("sst2",), methods=("pt", "dept", "ept"), missing=())
    labels = [axes.get_xlabel() + axes.get_ylabel() for plot in (plot_ranks, plot_time) for axes in plot(table).axes]
    assert sum("1 task," in label for label in labels) == 2 and not any("1 tasks" in label for label in labels)


def test_the_interval_of_a_mean_is_narrower_than_that_of_a_task(large):
    table = made_up(tasks=tuple(TASKS), methods=("pt", "ept"), missing=())
    found = table.overall().set_index("method").loc["ept"]
    widths = table.cells[table.cells["method"] == "ept"].eval("high - low")
    assert math.isnan(large.overall()["low"].max()), "of cb all compared methods share one seed of two"
    assert found["low"] < found["score"] < found["high"] and found["high"] - found["low"] < widths.median() / 2


@pytest.mark.parametrize(
    "size",
    [
        {"methods": ("ept",)},
        {"methods": ("pt",), "seeds": (0,)},
        {"tasks": ("cola",)},
        {"tasks": ("stsb",), "methods": ("frozen",), "seeds": (0,)},
        {"missing": ("cola-ept-0", "cola-ept-1", "cola-pt-0", "cola-pt-1", "cola-frozen-0", "cola-frozen-1")},
        {"missing": tuple(f"{t}-ept-{s}" for t in ("cola", "sst2", "stsb", "multirc", "cb") for s in (0, 1))},
        {"n": 2, "seeds": (0,)},
        {"n": 1, "seeds": (0,), "tasks": ("sst2",)},
    ],
    ids=["one method", "one method, one seed", "one task", "one run", "a task without runs", "no run of ept", "two examples", "one example"],
)
def test_small_and_broken_grids_have_a_report(size, tmp_path):
    table = made_up(**size)
    drawn = write_report(table, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len(drawn) and not re.search(r"\bnan\b", " ".join(image["alt"] for image in Parts(page).all("img")))
    assert not re.search(r"\bnan\b", re.sub(r"<[^>]*>", " ", page.split('id="figures"')[0]).lower())
    for name in set(FIGURES) - set(drawn):
        assert ABSENT[name].replace("<", "&lt;").replace(">", "&gt;") in page


# ---- tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["embedded", "benchmark"])
def test_published_scores_stand_apart_and_only_beside_real_ones(source):
    table = made_up(tasks=("cola", "cb"), source=source)
    part, beside = score_table(table), source == "benchmark"
    texts = (part.markdown(), part.html(), turned_table(table).latex(), turned_table(table, intervals=True).html())
    for text in texts:
        assert ("63.79" in text and "92.86" in text and "other setting" in text and "not measured here" in text) == beside
    assert part.aside == int(beside)
    assert not any("63.79" in f.to_csv() for f in frames(table).values()), "never among the numbers"
    assert set(PUBLISHED["scores"]) <= set(TASKS)


def test_latex_is_whole(large):
    for part in (turned_table(large), overall_table(large), comparison_table(large)):
        text = part.latex()
        rows = [row for row in text.splitlines() if row.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(part.columns) - 1} and len(rows) == len(part.rows) + 1
        assert text.count("{") == text.count("}") and [text.count(rf"\{r}rule") for r in ("top", "bottom")] == [1, 1]
        assert not re.search(r"(?<!\\)[_#]|[†‡±×`]|(?<!\\)%(?!$)", text, re.M), "nothing that LaTeX would stumble over"


def test_markdown_rows_have_as_many_cells_as_the_head(large):
    for part in (score_table(large), overall_table(large), comparison_table(large)):
        rows = [row for row in part.markdown().splitlines() if row.startswith("|")]
        assert {row.count("|") for row in rows} == {len(part.columns) + 1}


def test_every_number_is_in_csv(large):
    found = frames(large)
    assert len(found["scores"]) == 13 * 16 and len(found["overall"]) == 16 and len(found["comparison"]) == 15 and len(found["differences"]) == 13 * 15 - 2
    assert {"low", "high", "deviation", "missing", "near_floor", "best"} <= set(found["scores"])


def test_the_summary_holds_the_scores_that_are_there(filled, tmp_path):
    p, root = filled
    found = summary(read(p, root))
    assert found == {"frozen": {"cola": 50.0}, "pt": {"cola": 70.0, "cb": 80.0, "mean": 75.0}, "ept": {"cola": 95.0, "cb": 84.0, "mean": 89.5}}
    assert [list(found), list(found["pt"])] == [["frozen", "pt", "ept"], ["cola", "cb", "mean"]], "the grid's order"
    Paths(p, root).record("scores", "cola-frozen-0").unlink()
    assert "frozen" not in summary(read(p, root))


def test_curves_hold_the_steps_that_every_task_of_a_method_has(tmp_path):
    p = profile(methods=("pt", "ept"), seeds=(0, 1))
    for key, right in (("cola-pt-0", 60), ("cola-pt-1", 70), ("cb-pt-0", 80), ("cola-ept-0", 90), ("cb-ept-0", 50)):
        write(tmp_path, p, key, right)
    file = Paths(p, tmp_path).record("scores", "cb-ept-0")
    file.write_text(file.read_text().replace('"score": [45.0, 50.0]', '"score": [null, 50.004]'))
    found = curves(read(p, tmp_path))
    assert found.to_numpy().tolist() == [["pt", 10, 67.5], ["pt", 20, 72.5], ["ept", 20, (90 + 50.004) / 2]], "step 10 of ept is missing on cb"
    write_summary(read(p, tmp_path), tmp_path)
    assert (tmp_path / "curves.csv").read_bytes() == b"method,step,score\npt,10,67.50\npt,20,72.50\nept,20,70.00\n"
    frozen = made_up(methods=("frozen",))
    write_summary(frozen, tmp_path)
    assert (tmp_path / "curves.csv").read_text() == "method,step,score\n" and list(json.loads((tmp_path / "summary.json").read_text())) == ["frozen"]


def test_the_same_results_give_the_same_summary(filled, tmp_path):
    files = [[file.read_bytes() for file in write_summary(read(*filled), tmp_path / name)] for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 2


# ---- the page -------------------------------------------------------------------------------------------------------------


class Parts(HTMLParser):
    """The start tags of a page, with their attributes, and how many of the tags that must be closed are open."""

    VOID = {"meta", "img", "input", "br", "link", "hr"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def written(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    figures = write_report(large, folder)
    return folder, figures


@pytest.fixture(scope="module")
def parts(written):
    return Parts((written[0] / "report.html").read_text())


def test_the_page_needs_nothing_but_its_folder(written, parts):
    """What it loads are the figures beside it; what it links to lies on the page itself or in the results."""
    folder, figures = written
    page = (folder / "report.html").read_text()
    assert not parts.open and not parts.all("link", "iframe", "object") and not any("src" in script for script in parts.all("script"))
    assert "@import" not in page and "url(" not in page and len(page) < 300_000
    assert [image["src"] for image in parts.all("img")] == [f"figures/{name}.svg" for name in figures] and set(figures) == set(FIGURES)
    assert all((folder / image["src"]).exists() for image in parts.all("img"))
    identifiers = [attributes["id"] for _, attributes in parts.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers) and {link["href"].removeprefix("#") for link in parts.all("a")} <= set(identifiers)
    order = [page.index(f'<h2 id="{part}"') for part in ("findings", "tables", "figures", "protocol", "provenance")]
    assert order == sorted(order)


def test_the_page_can_be_read_by_keyboard_and_by_ear(parts):
    """One main part and a way to it, headings without a jump, scrolled parts that take the focus and have a name, figures that say what is to be seen."""
    assert len(parts.all("main")) == len(parts.all("h1")) == 1 and parts.all("a")[0] == {"class": "skip", "href": "#main"}
    levels = [int(tag[1]) for tag, _ in parts.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    regions = [a for a in parts.all("div") if a.get("class") == "wide"]
    assert len(regions) == len(parts.all("table")) + len(parts.all("img")) and all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)
    assert len({a["aria-label"] for a in regions}) == len(regions)
    for image in parts.all("img"):
        assert re.search(r"\d", image["alt"]) and "ept" in image["alt"] and "nan" not in image["alt"] and int(image["width"]) > 300 and int(image["height"]) > 80, image["src"]
    assert all(a.get("scope") in ("col", "row") for a in parts.all("th")) and parts.all("html")[0]["lang"] == "en"


def test_alternative_texts_follow_the_numbers(tmp_path, few_figures):
    p = profile(tasks=("cola", "cb"), methods=("pt", "ept"))
    for key, right in (("cola-pt-0", 60), ("cola-ept-0", 95), ("cb-pt-0", 90), ("cb-ept-0", 70)):
        write(tmp_path, p, key, right)
    write_report(read(p, tmp_path), tmp_path / "report")
    alt = {image["src"]: image["alt"] for image in Parts((tmp_path / "report" / "report.html").read_text()).all("img")}["figures/scores.svg"]
    assert "ept leads on 1 of 2 tasks; its largest lead is 35.0 points, on cola; its largest gap behind the best method is 20.0 points, on cb." in alt
    assert f"![{alt}](figures/scores.svg)" in (tmp_path / "report" / "table.md").read_text()


def test_words_in_figures_are_words(written):
    for file in (written[0] / "figures").glob("*.svg"):
        text = file.read_text()
        assert "</text>" in text and "glyph" not in text and "DejaVu Sans" in text, file.name
    text = (written[0] / "figures" / "scores.svg").read_text()
    assert all(f">{name}<" in text for name in FULL) and "cola (matthews)" in text


def test_each_figure_is_in_git_once():
    """A page or notebook with a picture inside would be a second copy of it."""
    listed = subprocess.run(["git", "ls-files", "results", "profiles"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    for name in listed.stdout.splitlines():
        if (ROOT / name).suffix in (".html", ".md", ".ipynb", ".png"):
            assert (ROOT / name).suffix in (".html", ".md") and "<svg" not in (ROOT / name).read_text() and "data:image" not in (ROOT / name).read_text(), name


def test_what_is_shown_is_escaped(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"))
    write(tmp_path, p, "cola-pt-0", 60), write(tmp_path, p, "cola-ept-0", 95)
    object.__setattr__(p.backbone, "name", "<b>a & b</b>")  # a name that is no name, as if it had come past the checks
    page = render(read(p, tmp_path), {})
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in page and "<b>a & b" not in page and not Parts(page).open


def test_each_score_links_to_its_record_and_predictions(filled, few_figures):
    p, root = filled
    write_report(read(p, root), Paths(p, root).report)
    links = [link["href"] for link in Parts((Paths(p, root).report / "report.html").read_text()).all("a") if not link["href"].startswith("#")]
    assert set(links) == {
        f"../{kind}/{key}.{end}" for key in ("cola-frozen-0", "cola-pt-0", "cola-ept-0", "cb-pt-0", "cb-ept-0") for kind, end in (("scores", "json"), ("predictions", "csv"))
    }
    assert len(links) == 10 and all((Paths(p, root).report / link).exists() for link in links)


def test_several_seeds_have_a_line_of_links_each(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"), seeds=(0, 1))
    for key in ("cola-pt-0", "cola-ept-0", "cola-ept-1"):
        write(tmp_path, p, key, 80)
    Paths(p, tmp_path).record("predictions", "cola-ept-1").unlink()
    both = score_table(read(p, tmp_path)).rows[0][-1]
    assert [list(files) for files in both.files.values()] == [["scores", "predictions"], ["scores"]]
    assert "seed 1: <a" in both.html() and both.html().count("<a ") == 3 and "<details>" not in score_table(made_up()).html()


@pytest.mark.parametrize("file", [f for n, f in profile_files(ROOT).items() if (f.parent / "results" / "report").exists()], ids=lambda f: f.parent.name)
def test_links_of_committed_pages_lead_to_files(file):
    folder = file.parent / "results" / "report"
    page = Parts((folder / "report.html").read_text())
    targets = [link["href"] for link in page.all("a") if not link["href"].startswith("#")] + [image["src"] for image in page.all("img")]
    assert len(targets) > 8 and not [target for target in targets if not (folder / target).exists()]


# ---- provenance -----------------------------------------------------------------------------------------------------------

NOW = {"format_version": FORMAT, "backbone": {"name": "tiny", "revision": None, "fingerprint": "4216"}, "packages": {"torch": "2.13.0"}}


def note(root, p, **records):
    """Add to records what they say about where they come from."""
    for key, more in records.items():
        file = Paths(p, root).record("scores", key.replace("_", "-"))
        file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.fixture
def two(tmp_path):
    p = profile(tasks=("cola",), methods=("frozen", "lora", "ept"))
    for key, right in (("cola-frozen-0", 50), ("cola-lora-0", 60), ("cola-ept-0", 95)):
        write(tmp_path, p, key, right)
    code = {method: present_code(method) for method in p.grid.methods}
    note(tmp_path, p, cola_frozen_0=NOW | {"code": code["frozen"] | {"train": None}}, cola_lora_0=NOW | {"code": code["lora"]}, cola_ept_0=NOW | {"code": code["ept"]})
    return p, tmp_path


def test_records_of_the_present_code_need_no_word(two):
    assert caveats(read(*two)) == []
    said = dict(provenance(read(*two)))
    assert (
        said["Command"] == "`make reproduce PROFILE=small`"
        and said["Records"] == "3 of 3 runs, format 2"
        and said["Packages"] == "torch 2.13.0"
        and said["Backbone"] == "tiny, weights `4216`"
    )
    assert "torch 2.13.0" in render(read(*two), {}).split('id="provenance"')[1]
    lora, ept = present_code("lora"), present_code("ept")
    evaluated = f"evaluation `{ept['evaluate']}` (frozen, ept: 2 runs); `{lora['evaluate']}` (lora: 1 run)"
    assert said["Code"] == f"training `{lora['train']}` (lora: 1 run); `{ept['train']}` (ept: 1 run); {evaluated}"
    assert said["Hardware"] == "a processor (cpu, float32)"


def test_present_code_is_what_training_and_evaluation_write():
    """The calls that make a record's fingerprints, found in the sources of those who write them."""
    written = {"train": ("training/training.py", "ept.training.training"), "evaluate": ("grid/records.py", "ept.training.evaluation")}
    for stage, (file, entry) in written.items():
        assert re.search(rf'code_version\("{re.escape(entry)}", \*module_of\([\w.]+\)\)', (ROOT / "ept" / file).read_text()), stage
        for method in ("lora", "mpt", "from elsewhere"):
            assert present_code(method)[stage] == code_version(entry, *module_of(method))
    assert len({present_code(method)["train"] for method in ("lora", "mpt", "ept", "from elsewhere")}) == 4


def test_records_of_another_method_have_other_code_and_that_is_no_caveat(two):
    """Fingerprints are compared within a method; another method's are another version."""
    p, root = two
    assert caveats(read(p, root)) == []
    note(root, p, cola_lora_0={"code": present_code("ept")})
    said = " ".join(caveats(read(p, root)))
    assert "Of 3 records, 1 was trained and 1 was evaluated by another version of the code than the present one" in said
    assert "versions of the code" not in said, "each method has one"
    note(root, p, cola_lora_0={"code": present_code("lora")}, cola_frozen_0={"code": {"train": None, "evaluate": "0123"}})
    assert "Of 3 records, 1 was evaluated by another version" in " ".join(caveats(read(p, root))), "a reference trains nothing"


def test_runs_of_one_method_by_different_code_are_mixed(tmp_path):
    p = profile(tasks=("cola", "cb"), methods=("lora",))
    for key, code in (("cola-lora-0", {"train": "0123", "evaluate": "4567"}), ("cb-lora-0", {"train": "89ab", "evaluate": "4567"})):
        write(tmp_path, p, key, 80)
        note(tmp_path, p, **{key: NOW | {"code": code}})
    assert "come from 2 versions of the code" in caveats(read(p, tmp_path))[1]


def test_runs_in_two_precisions_are_mixed(two):
    p, root = two
    for key, precision in (("cola-ept-0", "float32"), ("cola-lora-0", "float32")):
        measure(root, p, key, 5.0, "a", precision=precision)
    publish_costs(p, root, replace=True)
    assert caveats(read(p, root)) == []
    measure(root, p, "cola-lora-0", 5.0, "a", precision="bfloat16")
    publish_costs(p, root, replace=True)
    assert "come from 2 precisions:" in caveats(read(p, root))[0]


def test_what_does_not_fit_together_is_said(two):
    p, root = two
    for more, words in (
        (
            {"code": {"train": "0123", "evaluate": present_code("ept")["evaluate"]}},
            ["Of 3 records, 1 was trained by another version of the code than the present one"],
        ),
        ({"backbone": {"name": "tiny", "revision": None, "fingerprint": "9999"}}, ["come from 2 backbones:"]),
        ({"packages": {"torch": "2.4.0"}}, ["come from 2 sets of packages"]),
        ({"format_version": 1, "code": "a0d0", "backbone": {"name": "tiny"}}, ["1 of 3 records were made by an earlier version", "which weights the backbone had", "2 backbones"]),
    ):
        kept = Paths(p, root).record("scores", "cola-ept-0").read_text()
        note(root, p, cola_ept_0=more)
        table = read(p, root)
        said = caveats(table)
        assert all(word in " ".join(said) for word in words) and said == findings(table)[1 : 1 + len(said)]
        Paths(p, root).record("scores", "cola-ept-0").write_text(kept)


def test_the_format_of_records_is_the_one_that_is_written_today():
    source = (ROOT / "ept" / "grid" / "records.py").read_text()
    assert f'"format_version": {FORMAT},' in source


@pytest.mark.parametrize("file", [f for f in profile_files(ROOT).values() if (f.parent / "results" / "report").exists()], ids=lambda f: f.parent.name)
def test_a_committed_page_says_that_its_records_are_old(file):
    formats = {json.loads(f.read_text())["format_version"] for f in (file.parent / "results" / "scores").glob("*.json")}
    assert ("made by an earlier version of the code" in (file.parent / "results" / "report" / "report.html").read_text()) == (min(formats) < FORMAT)


def test_a_page_holds_no_time_and_no_place(written):
    """Made again it must be the same, in another clone and on another day."""
    page = (written[0] / "report.html").read_text()
    assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", page) and str(ROOT) not in page


# ---- files ----------------------------------------------------------------------------------------------------------------


def test_the_same_results_give_the_same_files(filled, tmp_path, few_figures):
    files = []
    for name in ("one", "two"):
        write_report(read(*filled), tmp_path / name)
        files.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert files[0] == files[1]
    assert {"report.html", "table.md", "table.csv", "tables/scores.tex", "tables/comparison.csv"} <= {str(p) for p in files[0]}


WRITE = """
import sys
from pathlib import Path
from ept.report.page import FIGURES, write_report
from ept.report.results import made_up
from ept.report.tables import write_summary
table = made_up(methods=("frozen", "pt", "dept", "ept-no-fusion", "ept"), tasks=("cola", "multirc", "stsb"))
assert set(write_report(table, Path(sys.argv[1]) / "report")) == set(FIGURES)
write_summary(table, sys.argv[1])
"""


@pytest.mark.slow
def test_another_process_gives_the_same_files(tmp_path):
    """With another order of sets, another user's settings of matplotlib, another number of threads, in another place on earth."""
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "matplotlibrc").write_text("font.size: 15\nfont.family: serif\nsvg.fonttype: path\nlines.solid_capstyle: round\nfigure.dpi: 200\naxes.labelpad: 9\n")
    ways = {
        "one": {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "TZ": "UTC"},
        "two": {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path / "settings")},
    }
    files = []
    for name, way in ways.items():
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / name)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **way})
        files.append({f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()})
    assert [name for name in files[0] if files[0][name] != files[1].get(name)] == [] and set(files[0]) == set(files[1])


def test_a_figure_without_content_is_left_out_and_the_page_says_why(tmp_path):
    p = profile(methods=("pt",))
    write(tmp_path, p, "cola-pt-0", 70)
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "report" / "figures" / "gates.svg").write_text("of an earlier grid")
    table = read(p, tmp_path)
    assert set(write_report(table, tmp_path / "report")) == {"scores", "speed", "curves"}
    assert not (tmp_path / "report" / "figures" / "gates.svg").exists()
    assert "no sweep over m, r and K has been run" in (tmp_path / "report" / "report.html").read_text()


def test_findings_follow_the_numbers(tmp_path):
    p = profile(tasks=("cola", "cb"), methods=("pt", "ept"))
    for task in ("cola", "cb"):
        write(tmp_path, p, f"{task}-pt-0", 60)
        write(tmp_path, p, f"{task}-ept-0", 95)
    text = " ".join(findings(read(p, tmp_path)))
    assert "`ept` has the highest mean score of 2 methods over 2 tasks, 95.0; next is `pt` with 60.0" in text and "2 wins, 0 ties, 0 losses" in text
    assert "+35.0 points" in text and "one seed" in text
    for task in ("cola", "cb"):
        write(tmp_path, p, f"{task}-ept-0", 59)
    text = " ".join(findings(read(p, tmp_path)))
    assert "`pt` has the highest mean score" in text and "next is `ept`" in text and "which of the two leads is open" in text


# ---- figures --------------------------------------------------------------------------------------------------------------


def test_every_method_of_a_large_grid_looks_different():
    looks = look([*FULL, "own", "another", "third"])
    assert len({(s["color"], s["marker"]) for s in looks.values()}) == len(looks)
    assert len({s["marker"] for m, s in looks.items() if m in NOTED}) == len(NOTED)


@pytest.mark.parametrize("name", list(FIGURES))
def test_no_two_labels_overlap(large, written, name):
    """Every text of every figure of the full grid has a place of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = written[1][name]
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in (a for a in figure.axes if a.get_visible()):
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis, side, limits in ((axes.xaxis, "labelbottom", axes.get_xlim()), (axes.yaxis, "labelleft", axes.get_ylim())):
            if axis.get_tick_params().get(side, True):
                inside = lambda label, i=int(axis is axes.yaxis), limits=limits: min(limits) <= label.get_position()[i] <= max(limits)
                texts += [label for label in axis.get_majorticklabels() if inside(label)]
    boxes = [(t.get_text(), Text.get_window_extent(t, renderer).padded(-0.8)) for t in texts if t.get_text() and t.get_visible()]  # words without the line to their point
    assert len(boxes) > 20
    assert not [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]


def test_figures_are_left_out_where_there_is_nothing_to_draw():
    alone = made_up(methods=("ept",), tasks=("cola",), seeds=(0,))
    for plot in (plot_ablations, plot_comparison, plot_parameters, plot_ranks, plot_time):
        assert plot(alone) is None
    frozen = made_up(methods=("frozen",))
    assert plot_curves(frozen) is None and plot_gates(frozen) is None and plot_sweep(frozen) is None


def test_a_sweep_is_read_from_records_and_drawn_with_the_grids_point(tmp_path):
    plain = profile(tasks=("cola",), methods=("pt", "ept"))
    p = replace(plain, sweep=Sweep(("cola",), (0,), ("rank-5", "rank-10", "rank-15")))
    write(tmp_path, p, "cola-pt-0", 70)
    write(tmp_path, p, "cola-ept-0", 90)
    assert read(plain, tmp_path).sweep.empty and plot_sweep(read(plain, tmp_path)) is None
    base = json.loads(Paths(p, tmp_path).record("scores", "cola-ept-0").read_text())
    for plan in p.sweep_runs()[:2]:
        Paths(p, tmp_path).record("scores", plan.key).write_text(json.dumps(base | {"swept": "rank", "score": 80.0 + plan.overrides["rank"]}))
    table = read(p, tmp_path)
    assert table.sweep[["swept", "value"]].to_numpy().tolist() == [["rank", 5], ["rank", 10], ["rank", 15]]
    assert table.sweep["score"].tolist()[:2] == [85.0, 90.0] and math.isnan(table.sweep["score"][2]), "a run that is missing is a row"
    assert len(table.runs) == 2, "a sweep's runs are no runs of the grid"
    axes = plot_sweep(table).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["5", "10", "20"], "the grid's own rank is a point, too"
    said = next(text for text in findings(table) if text.startswith("Sizes"))
    assert "on cola: r from 5 to 10, mean scores between 85.0 (r = 5) and 90.0 (10), the grid's own at 90.0" in said and "1 run of the sweep is missing" in said


def test_what_the_searches_chose_is_a_table():
    """A row for each method; marked is what lies within a tenth of its range, on the logarithmic scale, of an end."""
    search = Search(("sst2",), seeds=(100,), trials=8, rates={"learning_rate": (0.01, 3), "module_learning_rate": (1e-3, 1)}, sizes={"ept": {"short_length": (20, 40)}})
    table = made_up(methods=("frozen", "pt", "ept-no-fusion", "ept"))
    assert rates_table(table) is None, "nothing was searched"
    table = ScoreTable(replace(table.profile, search=replace(search, like={"ept-no-fusion": "ept"})), table.runs)
    part = rates_table(table)
    assert part.columns == ["method", "learning rate", "module learning rate"]
    assert [[cell.markdown() for cell in row] for row in part.rows] == [[name, "0.3", "0.95 (at an end)"] for name in ("pt", "ept-no-fusion (as ept)", "ept")]
    assert "8 trials" in part.caption and "ept short length 20, 40" in part.caption and "learning rate 0.01 to 3" in part.caption
    assert "Chosen on sst2 by 8 trials" in dict(protocol(table))["Rates and sizes"]


def test_the_protocol_says_how_source_prompts_were_trained():
    table = made_up(methods=("frozen", "pt", "ept"))
    assert "Source prompts" not in dict(protocol(table))
    grid = replace(table.profile.grid, transfer=("spot",), sources=("sst2", "mnli"))
    table = ScoreTable(replace(table.profile, grid=grid, sources={"learning_rate": 0.05, "steps": 1000}), table.runs)
    assert dict(protocol(table))["Source prompts"] == "spot start from prompts of sst2, mnli, trained by themselves on the same rows: learning_rate 0.05, steps 1000."


# ---- seeds ----------------------------------------------------------------------------------------------------------------


def test_the_variance_of_a_mean_over_drawn_seeds_is_that_of_the_mean():
    for count in (2, 3, 5):
        scores = np.random.default_rng(count).normal(70, 3, count)
        drawn = seed_weights(count, 40_000) @ scores
        assert drawn.mean() == pytest.approx(scores.mean(), abs=0.1)
        assert drawn.var() == pytest.approx(scores.var(ddof=1) / count, rel=0.05)


def called(seed_spread, hierarchical=True, trials=60, tasks=6, seeds=3, n=100):
    """How often two equal methods are told apart, whose runs differ by the luck of their seeds and of their answers."""
    generator, found = np.random.default_rng(0), 0
    for _ in range(trials):
        draws, apart = [], []
        for task in range(tasks):
            skills = 0.7 + seed_spread * generator.standard_normal((seeds, 2))
            answers = generator.random((seeds, 2, n)) < skills[..., None]
            drawn = resample("accuracy", answers.reshape(2 * seeds, n), np.ones(n), draws=400, seed=task).reshape(seeds, 2, -1)
            differences = drawn[:, 0] - drawn[:, 1]
            apart.append(100 * (answers[:, 0].mean(1) - answers[:, 1].mean(1)))
            draws.append(over_seeds(apart[-1], differences, task) if hierarchical else differences.mean(0))
        draws = np.mean(draws, 0)
        found += difference(0.0, draws, freedom=degrees_of_freedom(apart, draws) if hierarchical else math.inf).verdict != "tie"
    return found / trials


def test_luck_of_the_seeds_is_no_difference():
    """With seeds as they are every third or so comparison of equals is called; with seeds drawn it is about one in twenty, or fewer."""
    assert called(0.08, hierarchical=False) > 0.2
    assert called(0.08) <= 0.1


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 3), (2, 3), (1, 5)])
def test_few_seeds_are_not_taken_at_their_word(tasks, seeds):
    """Where seeds decide and there are few, percentiles of drawn seeds would call up to a quarter of all equals different."""
    assert called(0.15, trials=400, tasks=tasks, seeds=seeds, n=40) <= 0.09


def test_of_one_task_whose_seeds_decide_the_interval_is_students():
    apart = np.array([3.0, -1.0, 4.0, 2.0])
    draws = seed_weights(4, 40_000) @ apart
    found, student = difference(2.0, draws, freedom=degrees_of_freedom([apart], draws)), stats.ttest_1samp(apart, 0)
    assert (found.low, found.high) == pytest.approx(student.confidence_interval(), abs=0.4) and found.p == pytest.approx(student.pvalue, abs=0.03)
    ends = stats.t.ppf([0.975, 0.8], 3).sum()
    assert found.detectable == pytest.approx(ends * apart.std(ddof=1) / 2, rel=0.05)


def test_what_seeds_and_examples_do_together_counts_twice_at_most():
    """Answers that are luck throughout: other seeds or other examples change a mean over both by as much, so it is the luck of either."""
    answers, widths = np.random.default_rng(0).random((30, 4, 60)) < 0.7, []
    for run in answers:
        drawn = resample("accuracy", run, np.ones(60), draws=1000)
        widths.append(over_seeds(100 * run.mean(1), drawn).var())
    assert np.mean(widths) == pytest.approx(2 * 0.7 * 0.3 * 1e4 / (4 * 60), rel=0.15)


def test_more_seeds_than_one_widen_an_interval_where_they_differ(tmp_path):
    p = profile(tasks=("cola",), methods=("pt",), seeds=(0, 1, 2))
    widths = []
    for spread in (0, 10):
        for seed in (0, 1, 2):
            write(tmp_path, p, f"cola-pt-{seed}", 70 + spread * (seed - 1))
        cell = read(p, tmp_path).cell("cola", "pt")
        widths.append(cell["high"] - cell["low"])
    assert widths[1] > 1.3 * widths[0]


def test_the_detectable_difference_is_found_four_times_in_five():
    generator, error = np.random.default_rng(0), 1.5
    found = difference(0.0, generator.normal(0, error, 4000))
    assert found.detectable == pytest.approx(2.8 * error, rel=0.05)
    estimates = found.detectable + error * generator.standard_normal(4000)
    assert np.mean(estimates > 1.96 * error) == pytest.approx(0.8, abs=0.03)


# ---- contrasts, the budget ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched_grid():
    table = made_up(methods=("frozen", "pt", "lora", "dept", "mpt", "ept"), missing=("cb-pt-1",))
    return ScoreTable(replace(table.profile, search=Search(("sst2", "cb"), seeds=(100,), rates={"learning_rate": (0.01, 3)})), table.runs)


def test_two_contrasts_are_named_and_development_tasks_stand_apart(searched_grid):
    found = contrasts(searched_grid).set_index(["contrast", "over"])
    assert found["against"].to_dict() == {(kind, over): against for kind, against in (("primary", "dept"), ("secondary", "mpt")) for over in ("confirmation", "all", "development")}
    whole, parts = found.xs("all", level="over"), found.drop("all", level="over")
    assert parts["tasks"].groupby("contrast").sum().to_dict() == whole["tasks"].to_dict()
    primary = found.loc["primary"]
    mean = (3 * primary.loc["confirmation", "difference"] + 2 * primary.loc["development", "difference"]) / 5
    assert primary.loc["all", "difference"] == pytest.approx(mean)
    assert (found["detectable"] > 2.8 * found["error"]).all(), "two seeds"
    text = " ".join(findings(searched_grid))
    assert (
        "Primary contrast, `ept` minus `dept`" in text
        and "over 3 confirmation tasks and 6 pairs of runs" in text
        and "All tasks (5)" in text
        and "`mpt` was chosen by these scores, which favours it" in text
    )
    assert {"confirmation", "development"} <= set(overall_table(searched_grid).columns) & set(budget_table(searched_grid).columns)


def test_records_of_an_earlier_search_have_no_development_tasks(searched_grid):
    """A profile may name tasks that its committed records were not chosen on."""
    assert searched_grid.development == ["sst2", "cb"]
    old = [{**config, "search": {"factor": 1, "factors": [0.3, 1, 3]}} if config else None for config in searched_grid.runs["config"]]
    table = ScoreTable(searched_grid.profile, searched_grid.runs.assign(config=old))
    assert table.development == [] and table.parts == {} and rates_table(table) is None and "confirmation" not in table.overall()


def test_the_search_of_another_profile_says_which_tasks_were_for_development(tmp_path):
    (tmp_path / "profiles" / "first").mkdir(parents=True)
    for name in ("settings.ini", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    source = load_profile(profile_files(ROOT)["embedded-development"])
    text = source.file.read_text().replace("profile: embedded-development", "profile: first")
    (tmp_path / "profiles" / "first" / "params.yaml").write_text(text)
    other = replace(profile(tasks=("sst2", "rte")), search=Search(origin="first"), file=tmp_path / "profiles" / "second" / "params.yaml")
    assert searched(other).tasks == source.search.tasks and searched(source) is source.search


def test_a_table_reads_the_search_of_another_profile_once(searched_grid, monkeypatch):
    """Every question about development and confirmation asks for it, hundreds of times a page."""
    read = []
    monkeypatch.setattr("ept.report.results.searched", lambda profile: read.append(profile) or searched_grid.profile.search)
    table = ScoreTable(searched_grid.profile, searched_grid.runs)
    assert table.parts["development"] == ["sst2", "cb"] and not set(table.deciding) & {"sst2", "cb"} and len(read) == 1


@pytest.mark.parametrize("method", ["pt", "dept"])
def test_the_budget_is_read_off_a_record(method):
    """`l*d` from the count of `pt`, or of `dept` where a grid has no `pt`."""
    table = made_up(methods=(method, "lora", "ept"))
    assert table.budget == 100 * 768 and table.multiples == {method: 1.0, "lora": 49.0, "ept": 1.0} and table.within == [method, "ept"]


def test_without_a_budget_nothing_is_within_it():
    """No record tells `l*d` where a grid has neither `pt` nor `dept`."""
    table = made_up(methods=("lora", "ept"))
    assert math.isnan(table.budget) and table.within == [] and budget_table(table) is None
    assert "nan" not in " ".join(findings(table)) and "budget" not in " ".join(findings(table))


def test_a_multiple_a_little_above_one_is_not_within_the_budget():
    table = made_up(methods=("pt", "dept", "ept"))
    runs = table.runs.assign(trainable_parameters=[76_801 if m == "ept" else n for m, n in zip(table.runs["method"], table.runs["trainable_parameters"])])
    table = ScoreTable(table.profile, runs)
    assert table.within == ["pt", "dept"] and "ept" not in [row[0].value for row in budget_table(table).rows]
    assert next(row for row in overall_table(table).rows if row[0].value == "ept")[2].value == "1.0000", "and what is rounded shows that it is not one"


# ---- a grid that grows ----------------------------------------------------------------------------------------------------


def test_methods_are_compared_on_tasks_and_seeds_that_all_have(tmp_path):
    """Without it `ept`, whose hard task is still to come, would lead."""
    p = profile(tasks=("cola", "cb"), methods=("pt", "dept", "ept"), seeds=(0, 1))
    for task, seed, right in (("cola", 0, 90), ("cola", 1, 80), ("cb", 0, 50), ("cb", 1, 52)):
        for method, more in (("pt", 0), ("dept", 4), ("ept", 2)):
            if (task, method) != ("cb", "ept") or seed == 0:
                write(tmp_path, p, f"{task}-{method}-{seed}", right + more)
    table = read(p, tmp_path)
    assert table.pairs() == {"cola": [0, 1], "cb": [0]} and table.common == ["cola", "cb"]
    assert table.shared().loc["cb"].to_dict() == {"pt": 50.0, "dept": 54.0, "ept": 52.0}
    means = table.overall().set_index("method")
    assert means["score"].to_dict() == {"pt": 67.5, "dept": 71.5, "ept": 69.5} and means["rank"].to_dict() == {"pt": 3.0, "dept": 1.0, "ept": 2.0}
    text = " ".join(findings(table))
    assert "11 of 12 runs of the grid are there. Means and ranks are over the 3 of 4 pairs of a task and a seed that all 3 compared methods have" in text
    part = runs_table(table)
    assert [[cell.value for cell in row] for row in part.rows] == [["pt", "2", "2", "4"], ["dept", "2", "2", "4"], ["ept", "2", "1 of 2", "3 of 4"]]
    assert "mean, shared runs" in turned_table(table).columns and "mean" in turned_table(made_up(missing=())).columns and runs_table(made_up(missing=())) is None


def test_a_method_that_has_just_begun_does_not_shrink_the_comparison(large):
    gone = tuple(f"{t}-lora-{s}" for t in large.tasks[1:] for s in (0, 1))
    table = made_up(tasks=tuple(TASKS), methods=("pt", "lora", "dept", "ept"), missing=gone)
    assert table.compared == ["pt", "dept", "ept"] and len(table.common) == 13 and "Not yet compared" in runs_table(table).caption
    overall = table.overall().set_index("method")
    assert math.isnan(overall.loc["lora", "score"]) and not overall.loc[["pt", "dept", "ept"], "score"].isna().any()
    assert set(table.compare()["method"]) == {"pt", "dept"} and set(table.differences()["method"]) == {"pt", "lora", "dept"}


# ---- learning -------------------------------------------------------------------------------------------------------------


def with_history(table, histories):
    """The same table with other histories, from those by method."""
    return ScoreTable(table.profile, table.runs.assign(history=[histories[m] for m in table.runs["method"]]))


def test_speed_is_read_off_the_validations():
    table = made_up(methods=("pt", "dept", "ept"), tasks=("cola", "cb"), missing=())
    scores = {"pt": [50, 55, 58, 60], "dept": [60, 64, 72, 70], "ept": [72, 71, 73, 73]}
    found = speed(with_history(table, {m: {"step": [75, 150, 225, 300], "loss": [1.0] * 4, "score": s} for m, s in scores.items()}))
    assert found[["quarter", "half", "whole", "gain"]].to_numpy().tolist() == [[50, 55, 60, 5], [60, 64, 72, 8], [72, 72, 73, 1]]
    assert found["to_pt"].tolist() == [300, 75, 75] and found[["to_dept"]].fillna(-1)["to_dept"].tolist() == [-1, 225, 75]
    assert found["reach_dept"].tolist() == [0, 1, 1] and found["area"].is_monotonic_increasing


def test_a_target_that_most_runs_miss_has_no_median_step():
    table = made_up(methods=("dept", "ept"), tasks=("cola",), seeds=(0, 1, 2), missing=())
    history = lambda end: {"step": [150, 300], "loss": [1.0, 1.0], "score": [40.0, end]}
    runs = table.runs.assign(history=[history(70 if m == "dept" else 71 if seed == 0 else 60) for m, seed in zip(table.runs["method"], table.runs["seed"])])
    found = speed(ScoreTable(table.profile, runs)).loc["ept"]
    assert found["reach_dept"] == pytest.approx(1 / 3) and math.isnan(found["to_dept"])
    row = speed_table(ScoreTable(table.profile, runs)).rows[-1]
    assert row[-1].value == "–" and row[-1].small == "33 % of runs"


def test_a_second_half_that_still_adds_is_said():
    table = made_up(methods=("dept", "ept"), tasks=("cola",), missing=())
    grown = lambda late: {"step": [150, 300], "loss": [1.0, 1.0], "score": [60.0, 60.0 + late]}
    assert "The second half still added more than a point to `dept` (+4.0): where" in " ".join(findings(with_history(table, {"dept": grown(4.0), "ept": grown(0.5)})))
    assert "second half" not in " ".join(findings(with_history(table, {"dept": grown(0.5), "ept": grown(0.5)})))


def test_runs_whose_modules_stayed_are_marked_and_counted(tmp_path, few_figures):
    table = made_up(methods=("dept", "ept"), tasks=("cola", "cb"), missing=())
    there = lambda size: {"step": [150, 300], "loss": [1.0, 1.0], "score": [60.0, 70.0], "fusion": [0.0, size], "projection": [0.0, 0.0], "gate_entropy": [1.0, 1.0]}
    table = with_history(table, {"dept": {"step": [150, 300], "loss": [1.0, 1.0], "score": [60.0, 70.0]}, "ept": there(0.001)})
    assert stayed(table) == {"ept": (4, 4)} and "stayed at their start in 4 of 4 runs of `ept` (§)" in " ".join(findings(table))
    assert all(table.cell(t, "ept")["stayed"] == 2 and table.cell(t, "dept")["stayed"] == 0 for t in table.tasks)
    assert "§" in score_table(table).markdown() and r"\S{}" in turned_table(table).latex()
    moved = with_history(table, {"dept": there(0.0), "ept": there(0.3)})
    assert stayed(moved) == {"dept": (4, 4), "ept": (0, 4)}
    write_report(table, tmp_path)
    runs = pd.read_csv(tmp_path / "tables" / "runs.csv")
    assert runs["modules_moved"].dropna().tolist() == [False] * 4 and len(runs) == 8


def test_how_fast_is_asked_on_confirmation_tasks(searched_grid):
    """Table, sentence and figure leave out the tasks on which rates were chosen."""
    runs, found = learned(searched_grid), speed(searched_grid)
    own = runs[(runs["method"] == "ept") & ~runs["task"].isin(["sst2", "cb"])]
    assert found.loc["ept", "runs"] == len(own) == 6 and found.loc["ept", "reach_dept"] == own["to_dept"].notna().mean()
    curve, _ = progress(searched_grid)
    assert curve[curve["method"] == "ept"]["score"].iloc[-1] == pytest.approx(own.groupby("task")["whole"].mean().mean())
    assert "all of the steps, on the confirmation tasks: `ept`" in " ".join(findings(searched_grid)) and "on the 6 pairs of both" in speed_table(searched_grid).caption
    assert "on the confirmation tasks" not in " ".join(findings(made_up()))


@pytest.mark.parametrize(("text", "number"), [("3e-05", 3e-5), ("<0.001", 0.001), ("76,800", 76800.0), ("-1.5", -1.5), ("missing", None), ("12 of 40", 12.0)])
def test_a_column_is_sorted_by_the_number_that_is_shown(text, number):
    assert Cell(text).number == number


def test_quartiles_of_what_happens_inside_are_over_runs():
    table = made_up(methods=("ept",), tasks=("cola", "cb"), seeds=(0, 1), missing=())
    runs = table.runs.assign(history=[{"step": [50, 100], "loss": [1.0, 1.0], "score": [None, 60.0], "fusion": [None, value]} for value in (0.1, 0.2, 0.3, 0.4)])
    found = inside(ScoreTable(table.profile, runs))
    assert found[["column", "step"]].to_numpy().tolist() == [["fusion", 100]]
    assert found[["low", "middle", "high"]].to_numpy()[0] == pytest.approx([0.175, 0.25, 0.325])
    assert plot_inside(ScoreTable(table.profile, runs)).axes[0].get_title().startswith("fusion") and plot_inside(made_up(methods=("pt",))) is None


def test_ahead_by_when_resamples_seeds_and_is_asked_on_confirmation_tasks(searched_grid):
    found = ahead(searched_grid).set_index(["against", "share"])
    assert set(found["tasks"]) == {3} and (found["low"] <= found["difference"]).all() and (found["difference"] <= found["high"]).all()
    runs = learned(searched_grid).set_index(["method", "task", "seed"])["half"]
    mean = np.mean([runs["ept", t, s] - runs["dept", t, s] for t in ("cola", "stsb", "multirc") for s in (0, 1)])
    assert found.loc[("dept", "half"), "difference"] == pytest.approx(mean) and [row[0].value for row in ahead_table(searched_grid).rows] == ["dept", "pt"]
    same = with_history(made_up(methods=("dept", "ept"), tasks=("cola",), missing=()), {m: {"step": [75, 300], "loss": [1.0] * 2, "score": [50.0, 60.0]} for m in ("dept", "ept")})
    assert ahead(same)["difference"].eq(0).all() and ahead(same)["p"].eq(1).all()


def test_a_grid_whose_tasks_are_all_for_development_says_so():
    table = made_up(methods=("pt", "dept", "ept"), tasks=("cola", "cb"))
    table = ScoreTable(replace(table.profile, search=Search(("cola", "cb"), seeds=(100,), rates={"learning_rate": (0.01, 3)})), table.runs)
    assert table.parts == {} and "All tasks are development tasks" in overall_table(table).caption and set(contrasts(table)["over"]) == {"all"}


def test_the_ticks_of_tokens_are_whole_and_those_of_small_sizes_are_round():
    """Twenty tokens had a tick at 2.5; an offset below one per cent had one, at its largest value."""
    profile = load_profile(ROOT / "params.yaml")
    table = ScoreTable(profile, collect(profile))
    assert all(tick == round(tick) for panel in plot_gates(table).axes[:-1] for tick in panel.get_xticks())
    panels = {panel.get_title().partition(",")[0]: panel for panel in plot_inside(table).axes}
    assert all(tick == float(f"{tick:.2g}") for tick in panels["offset"].get_yticks()), panels["offset"].get_yticks()
