"""Intervals, marks and gaps of the result table, and the page that shows them."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ept.figures import look, plot_gates, write_report
from ept.metrics import score_task
from ept.profiles import BackboneChoice, DataChoice, Grid, Paths, Profile
from ept.results import ScoreTable, collect, interval, to_html, to_markdown

METHODS = ("frozen", "pt", "ept")


def profile(tasks=("cola", "cb"), methods=METHODS, seeds=(0,), name="small"):
    return Profile(
        name, ".", "", BackboneChoice("none"), DataChoice("embedded", "data"), Grid(tuple(tasks), tuple(methods), tuple(seeds)),
        {}, {m: {} for m in methods}, {t: {} for t in tasks},
    )  # fmt: skip


def write(root, profile, key, right, n=100, metric="accuracy", seconds=10.0, gates=None, constant=False):
    """A run that gets `right` of `n` examples right."""
    task, _, seed = key.rsplit("-", 2)[0].split("-")[0], None, key.rsplit("-", 1)[1]
    method = key.removeprefix(f"{task}-").removesuffix(f"-{seed}")
    labels = np.arange(n) % 2
    predictions = np.zeros(n, dtype=int) if constant else np.where(np.arange(n) < right, labels, 1 - labels)
    score = 100 * float((labels == predictions).mean())
    record = {
        "task": task, "method": method, "seed": int(seed), "metric": metric, "score": score, "majority_score": 50.0, "n": n,
        "trainable_parameters": 0 if method == "frozen" else 6400, "chosen_step": 20, "metrics": {metric: {"value": score, "n": n}},
        "history": {"step": [10, 20], "loss": [1.0, 0.5], "score": [score - 5, score]}, "gate_weights": gates, "backbone": {"revision": None},
    }  # fmt: skip
    paths = Paths(profile, root)
    for kind, text in (
        ("scores", json.dumps(record)),
        ("costs", json.dumps({"train_seconds": seconds})),
        ("predictions", pd.DataFrame({"label": labels, "prediction": predictions}).to_csv(index_label="index")),
    ):
        file = paths.record(kind, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


# ---- intervals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [28, 52, 139, 872])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_accuracy_has_wilsons_interval(n, share):
    right = int(share * n)
    p, z = right / n, stats.norm.ppf(0.975)
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = interval("accuracy", np.arange(n) < right, np.ones(n, dtype=bool))
    np.testing.assert_allclose(found, (100 * (centre - half), 100 * (centre + half)), atol=1e-9)


@pytest.mark.parametrize(("task", "metric"), [("cola", "matthews"), ("multirc", "f1")])
def test_bootstrap_of_counts_is_the_bootstrap_of_examples(task, metric):
    """Drawing confusion counts gives the interval that drawing examples and scoring them anew gives."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    predictions = np.where(generator.random(300) < 0.75, labels, 1 - labels)
    drawn = []
    for _ in range(600):
        rows = generator.integers(0, 300, 300)
        drawn.append(score_task(task, predictions[rows], labels[rows], groups=range(300))[metric])
    np.testing.assert_allclose(interval(metric, predictions, labels), np.quantile(drawn, [0.025, 0.975]), atol=1.5)


def test_correlation_has_fishers_interval():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=120)
    predictions = labels + generator.normal(size=120)
    expected = stats.pearsonr(predictions, labels).confidence_interval()
    np.testing.assert_allclose(interval("pearson", predictions, labels), (100 * expected.low, 100 * expected.high), atol=0.05)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_answers_have_no_correlation_interval(metric):
    assert all(math.isnan(v) for v in interval(metric, [2.5] * 20, list(range(20))))


# ---- the table ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    p = profile()
    write(tmp_path, p, "cola-frozen-0", 50, constant=True, seconds=0.0)
    write(tmp_path, p, "cola-pt-0", 70, seconds=20.0)
    write(tmp_path, p, "cola-ept-0", 95, seconds=10.0, gates=[[0.4, 0.6], [0.5, 0.5]])
    write(tmp_path, p, "cb-pt-0", 80, seconds=30.0)
    write(tmp_path, p, "cb-ept-0", 84, seconds=15.0, gates=[[0.4, 0.6], [0.5, 0.5]])
    return p, tmp_path


def test_a_missing_cell_stays_empty(filled):
    text = to_markdown(ScoreTable(filled[0], collect(*filled)))
    row = next(line for line in text.splitlines() if line.startswith("| cb |"))
    assert row.split("|")[5].strip() == "" and "80.0" in row and "84.0" in row
    assert "5 of 6 runs" in text
    assert re.search(r"\| mean \|[^|]*\|[^|]*\| 50.0 \|  \| 75.0 \| 89.5 \|", text), "no mean over a column with a gap"


def test_only_a_gap_beyond_the_interval_is_bold(filled):
    text = to_markdown(ScoreTable(filled[0], collect(*filled)))
    assert "**95.0**" in text
    assert "84.0" in text and "**84.0**" not in text, "four points on a hundred examples are not a difference"


def test_answering_always_the_same_is_marked(filled):
    table = ScoreTable(filled[0], collect(*filled))
    assert re.search(r"50\.0 \([\d.]+ to [\d.]+\) †", to_markdown(table))
    assert to_markdown(table).count("†") == 2, "one run, and the caption that explains the sign"


def test_time_is_relative_to_prompt_tuning(filled):
    table = ScoreTable(filled[0], collect(*filled))
    assert table.foot()[2][4:] == ["0.00", "1.00", "0.50"] or table.foot()[2][4:] == ["", "1.00", "0.50"]
    cells = table.cells.set_index(["task", "method"])["time_of_pt"]
    assert cells["cola", "ept"] == 0.5 and cells["cb", "ept"] == 0.5


def test_several_seeds_give_mean_and_deviation(tmp_path):
    p = profile(tasks=("cola",), methods=("pt", "ept"), seeds=(0, 1, 2))
    for seed, (pt, ept) in enumerate([(70, 90), (72, 92), (74, 94)]):
        write(tmp_path, p, f"cola-pt-{seed}", pt)
        write(tmp_path, p, f"cola-ept-{seed}", ept)
    text = to_markdown(ScoreTable(p, collect(p, tmp_path)))
    assert "| 72.0 ± 2.0 | **92.0** ± 2.0 |" in text and "seeds 0, 1, 2" in text and "mean ± standard deviation" in text


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
    table = ScoreTable(p, collect(p, tmp_path))
    for text in (to_markdown(table), to_html(table)):
        assert "embedded: proves the machinery, says nothing about English" in text


# ---- the page -----------------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Collects what a page would fetch from elsewhere."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if tag in ("script", "link", "iframe", "object") or (name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))):
                self.found.append((tag, name, value))


def test_the_page_needs_nothing_but_itself(filled, tmp_path):
    write_report(ScoreTable(filled[0], collect(*filled)), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert not loads.found and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 4 and page.count('role="img"') == 4


def test_identifiers_in_the_page_are_not_shared_by_two_figures(filled, tmp_path):
    """Figures in one page share a name space: a clip path of one must not be found by another under the same name."""
    write_report(ScoreTable(filled[0], collect(*filled)), tmp_path / "report")
    clips = {}
    for file in (tmp_path / "report" / "figures").glob("*.svg"):
        for name, body in re.findall(r'<clipPath id="([^"]+)">(.*?)</clipPath>', file.read_text(), re.S):
            assert clips.setdefault(name, body) == body, f"{name} means two things"


def test_the_same_results_give_the_same_files(filled, tmp_path):
    files = []
    for name in ("one", "two"):
        write_report(ScoreTable(filled[0], collect(*filled)), tmp_path / name)
        files.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert files[0] == files[1]


def test_a_figure_without_content_is_left_out(tmp_path):
    p = profile(methods=("pt",))
    write(tmp_path, p, "cola-pt-0", 70)
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "report" / "figures" / "gates.svg").write_text("of an earlier grid")
    table = ScoreTable(p, collect(p, tmp_path))
    assert plot_gates(table) is None
    assert set(write_report(table, tmp_path / "report")) == {"scores", "curves", "time"}
    assert not (tmp_path / "report" / "figures" / "gates.svg").exists()


def test_every_method_of_a_large_grid_looks_different():
    looks = look(["frozen", "pt", "ept", "dept", "lora", "ept-no-fusion", "ept-no-projection", "ept-one-space"])
    assert len({(s["color"], s["marker"]) for s in looks.values()}) == len(looks)
