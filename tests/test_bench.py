"""The benchmark runs, on a tiny shape, and its page says what its result files say."""

import json
from pathlib import Path

import pytest

import bench
import checkpointing
import contender
import paper
import scaling
import serving
import show
import text_gate
from ept.data.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("bench") / "tiny")
    contender.backbone({"shape": "tiny", "folder": folder})
    return {"shape": "tiny", "folder": folder, "batch_size": 2, "lengths": [8, 24], "warm_up": 1, "steps": 2}


@pytest.mark.parametrize("name", bench.TRAINED)
def test_every_contender_trains(name, job):
    found = contender.train({**job, "contender": name})
    assert {n: len(s) for n, s in found["step_seconds"].items()} == {8: 2, 24: 2}, "the first step of a length is not counted"
    assert found["peak_bytes"] > 0


@pytest.mark.parametrize("name", bench.SCORED)
def test_every_contender_scores(name, job):
    found = contender.infer({**job, "contender": name, "folded": name in ("pt", "dept", "ept")})
    assert {n: len(s) for n, s in found["score_seconds"].items()} == {8: 2, 24: 2}


@pytest.mark.parametrize("name", ["pt", "dept", "ept"])
def test_the_prompt_alone_is_timed(name, job):
    assert len(contender.prompt({**job, "contender": name})["prompt_seconds"]) == 40


def test_longer_texts_take_more_operations_and_a_short_prompt_fewer(job):
    count = lambda name: contender.operations({**job, "contender": name})["operations"]
    peft, ours, plain = count("peft-pt"), count("ept"), count("pt")
    assert ours[8] < ours[24] and ours[8] < plain[8] <= 1.05 * peft[8]


def test_batches_hold_every_text_and_ours_are_cut_to_multiples_of_eight():
    lengths = bench.sample("sst2", "t5-base", 64)
    assert sum(bench.batches("peft-pt", lengths, 8)) >= sum(bench.batches("peft-pt-tuned", lengths, 8)), "grouping by length pads less"
    assert len(bench.batches("ept", lengths, 8)) == 8 and all(n % 8 == 0 for n in bench.batches("ept", lengths, 8))
    assert max(bench.batches("peft-pt", lengths, 8)) == max(lengths)


def test_times_between_measured_lengths_lie_on_the_line():
    steps = {"32": {"median": 1.0}, "128": {"median": 4.0}, "256": {"median": 9.0}}
    assert [bench.seconds_of(steps, n) for n in (32, 80, 128, 256)] == [1.0, 2.5, 4.0, 9.0]


def test_lengths_are_counted_for_the_papers_tasks():
    counts = json.loads((ROOT / "bench" / "lengths.json").read_text())
    assert set(counts) == {"fields", "question", "t5"}
    for kind, found in counts.items():
        assert len(found) == 13 and set(found) <= set(TASKS), "the paper's; another task needs no entry"
        longest = {name: 348 if (kind, name) == ("t5", "multirc") else 256 for name in found}
        assert all(200 <= sum(task.values()) <= 2000 and max(map(int, task)) <= longest[name] for name, task in found.items())


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_shares_are_of_the_rate_measured_in_the_same_run(file):
    for shape in json.loads(file.read_text())["shapes"].values():
        assert set(shape["rates"]) == {"float32", "bfloat16"}
        for found in shape["train"].values():
            assert all(0 < found["operations"][n] / s["median"] < max(shape["rates"].values()) for n, s in found["step_seconds"].items())


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_page_shows_the_results(file):
    page = (ROOT / "bench" / "README.md").read_text()
    assert show.show(file) in page, f"run: python bench/show.py {file.relative_to(ROOT)} --readme"
    assert f"results/{file.stem}.svg" in page and file.with_suffix(".svg").exists()


def test_each_way_of_serving_answers_the_same(job):
    """On the tiny shape, in this process: what a process of each way computes."""
    from ept.model.bank import PromptBank

    backbone, models = serving.load({**job, "tasks": [0, 1, 2], "threads": 1, "precision": "float32"})
    requests = serving.draw(waiting=7, tasks=3, seed=1, vocabulary=320)
    assert sorted(task for task, _ in requests) == [0, 0, 0, 1, 1, 2, 2] and requests != serving.draw(7, 3, seed=2, vocabulary=320)
    apart = serving.answer_by_models(models, requests)
    together = serving.answer_by_bank(PromptBank(backbone, {str(task): model for task, model in models.items()}), requests)
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(apart, together, strict=True))
    assert len({tuple(scores) for scores in apart}) == 7


def test_a_process_serves(job):
    requests = serving.draw(waiting=4, tasks=2, seed=1, vocabulary=320)
    with serving.Server("bank", tasks=2, cores=1, folder=job["folder"], shape="tiny", precision="float32") as server:
        scores, seconds = server.answer(requests)
        assert len(scores) == 4 and seconds > 0
        if Path("/proc/self/smaps_rollup").exists():
            assert server.memory() > 1e7


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results" / "serving").glob("*.json")), ids=lambda f: f.stem)
def test_page_shows_what_serving_costs(file):
    """Ratios are of rounds side by side, so their medians need not be those of the rates."""
    found, page = json.loads(file.read_text()), (ROOT / "bench" / "README.md").read_text()
    assert serving.show(found) in page, f"run: python bench/serving.py --show {file.relative_to(ROOT)}"
    assert set(found["memory_bytes"]) == set(serving.WAYS) and found["largest_difference"] >= 0
    assert all(ways["processes"]["times_processes"]["median"] == 1 for ways in found["waiting"].values())


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results" / "checkpointing").glob("*.json")), ids=lambda f: f.stem)
def test_page_shows_what_gradient_checkpointing_saves(file):
    found = json.loads(file.read_text())
    assert checkpointing.show(found) in (ROOT / "bench" / "README.md").read_text(), f"run: python bench/checkpointing.py --show {file.relative_to(ROOT)}"
    for length in {step["length"] for step in found["steps"]}:
        off, on = sorted((step for step in found["steps"] if step["length"] == length), key=lambda step: step["checkpointing"])
        assert on["step_bytes"] < off["step_bytes"] and (on["loss"], on["gradient"]) == (off["loss"], off["gradient"])


def test_a_gate_that_reads_the_text_is_timed_unfolded(job):
    found = contender.train({**job, "contender": "ept-text-gate"}) | contender.infer({**job, "contender": "ept-text-gate"})
    assert {n: len(s) for n, s in found["step_seconds"].items()} == {n: len(s) for n, s in found["score_seconds"].items()} == {8: 2, 24: 2}
    assert "ept-text-gate".startswith(bench.UNFOLDED) and not {"dept", "ept"} & set(bench.UNFOLDED)


def test_ratios_are_of_the_same_round():
    answers = {"ept": [{"s": {"8": [1.0]}}, {"s": {"8": [3.0]}}], "dept": [{"s": {"8": [2.0]}}, {"s": {"8": [3.0]}}]}
    found = text_gate.compare(answers, "s")["dept"]["8"]
    assert (found["seconds"]["median"], found["to_ept"]["median"]) == (2.5, 1.5)


@pytest.mark.parametrize("file", sorted(text_gate.RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_page_shows_what_a_gate_that_reads_the_text_costs(file):
    assert text_gate.show(json.loads(file.read_text())) in text_gate.PAGE.read_text(), f"run: python bench/text_gate.py --show {file}"


# ---- grids --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True], ids=["a file for each task", "one file"])
def test_a_grid_is_made_and_measured_in_both_layouts(flat):
    with scaling.project({"tasks": 2, "methods": 2, "seeds": 1}, flat, work="sleep 0.1 && ") as root:
        made, again = (scaling.measure(root, workers=2) for _ in range(2))
        assert (root / "report").read_text().strip() == "4"
    assert (made["made"], again["made"]) == (9, 0)
    assert 0 < scaling.efficiency(made, 0.1, 2) < 1 and 0 < made["cpu_seconds"] < made["seconds"]


# ---- the paper's grid, in made-up time ----------------------------------------------------------------------------------

NEEDS = {"rows": set(), **{f"train-{i}": {"rows"} for i in range(6)}, **{f"score-{i}": {f"train-{i}"} for i in range(6)}, "report": {f"score-{i}" for i in range(6)}}
SECONDS = {"rows": 1.0, **{f"train-{i}": 10.0 + i for i in range(6)}, **{f"score-{i}": 2.0 for i in range(6)}, "report": 1.0}
ON_GPU = {stage for stage in NEEDS if "-" in stage}


@pytest.mark.parametrize("gpus", [1, 2, 3, 6, 64])
def test_a_simulated_grid_is_bounded_by_its_work_and_its_longest_chain(gpus):
    took, chain = paper.simulate(NEEDS, SECONDS, ON_GPU, gpus), paper.longest_chain(NEEDS, SECONDS)
    assert chain == ["rows", "train-5", "score-5", "report"]
    work, least = sum(SECONDS[stage] for stage in ON_GPU), sum(SECONDS[stage] for stage in chain)
    assert took >= max(work / gpus, least)
    assert took == (work + 2 if gpus == 1 else least if gpus >= 6 else took), "one after another, and all at once"


def test_a_step_takes_as_long_as_its_operations_or_its_launching():
    costs = paper.Costs.__new__(paper.Costs)
    costs.share, costs.together = 0.5, 1
    costs.steps = {"ept": {"precision": "bfloat16", "operations": {"32": 1e12, "128": 4e12}, "launch_seconds": 0.02}}
    rate = 0.5 * paper.ASSUMED["bfloat16"]
    assert costs.step("ept", 128, 32) == 32 * 4e12 / rate and costs.step("ept", 32, 0.001) == 0.02
    costs.together = 2
    assert costs.step("ept", 128, 32) == 2 * 32 * 4e12 / rate, "two runs share the GPU"


def test_a_launched_step_is_timed(job):
    assert len(contender.launch({**job, "contender": "ept"})["launch_seconds"]) == 2


@pytest.mark.skipif(not paper.HOURS.exists(), reason="not computed yet; run `make hours ARGS=--count`")
def test_the_page_says_what_was_computed_of_the_papers_grid():
    assert paper.show(json.loads(paper.HOURS.read_text())) in (ROOT / "bench" / "README.md").read_text(), "run: make hours"
