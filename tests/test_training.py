"""Training: learning rates, batches, resume, and what happens when it goes wrong."""

import copy
import errno
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from ept.data.tasks import Task
from ept.grid.records import _saved, compact_json
from ept.methods.catalogue import SHARED
from ept.methods.registry import METHODS, build_method
from ept.methods.sources import SOURCE_TASKS
from ept.model.modeling import EPTModel
from ept.prompt.soft import SoftPrompt
from ept.training import training
from ept.training.checkpoints import last_checkpoint, seal_checkpoint
from ept.training.config import NonFiniteLoss, TrainingConfig
from ept.training.curves import area_under, at_shares, steps_to
from ept.training.evaluation import evaluate
from ept.training.inside import modules_moved
from ept.training.trainer import PromptTrainer, optimizer_groups
from ept.training.training import train
from tests.conftest import WIDTH, tiny_backbone
from tests.letters import wait_until

SIZES = dict(prompt_length=60, short_length=8, max_length=48, spaces=2, space_width=1, fusion_width=1)
TASK = Task("colour", ("text",), ("no", "yes"), ("accuracy",))
CONFIG = TrainingConfig(steps=8, batch_size=4, evaluate_every=2, learning_rate=0.1, pair_learning_rate=0.01, module_learning_rate=0.01)


@pytest.fixture
def data():
    rows = [{"text": f"{w} {n}", "label": int(w == "red")} for n in range(8) for w in ("red", "blue")]
    return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation", "test")})


@pytest.fixture
def run(backbone, data, tmp_path):
    return train(TASK, "ept", 0, backbone, data, tmp_path / "adapter", training=CONFIG, sizes=SIZES, progress=False)


def test_each_learning_rate_reaches_the_parameters_it_names(backbone):
    model = build_method("ept", backbone.model, **SIZES)
    config = TrainingConfig(learning_rate=0.3, pair_learning_rate=0.02, module_learning_rate=0.001)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer_groups(model, config) for p in group["params"]}
    assert rates == {
        "prompt.embeddings": 0.3,
        "prompt.offset.position_factors": 0.02,
        "prompt.offset.embedding_factors": 0.02,
        "prompt.fusion.query": 0.001,
        "prompt.fusion.key": 0.001,
        "prompt.fusion.strength": 0.001,
        "prompt.projection.down": 0.001,
        "prompt.projection.up": 0.001,
        "prompt.projection.gate": 0.001,
    }


def test_a_rate_of_nearly_zero_leaves_its_group_alone(backbone, data, tmp_path):
    config = TrainingConfig(steps=4, batch_size=4, evaluate_every=4, learning_rate=0.1, pair_learning_rate=1e-30, module_learning_rate=0.1)
    before = build_method("ept", backbone.model, **SIZES).prompt.state_dict()
    run = train(TASK, "ept", 0, backbone, data, tmp_path / "a", training=config, sizes=SIZES, progress=False)
    after = load_file(run.adapter_dir / "adapter_model.safetensors")
    moved = {name for name in after if not torch.allclose(before[name], after[name], rtol=0, atol=1e-12)}
    assert not any(name.startswith("offset") for name in moved)
    assert "embeddings" in moved and "projection.up" in moved


def test_the_backbone_is_bit_identical_after_training(data, tmp_path):
    backbone = tiny_backbone("t5")
    before = copy.deepcopy(backbone.model.state_dict())
    train(TASK, "ept", 0, backbone, data, tmp_path / "a", training=CONFIG, sizes=SIZES, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert all(p.grad is None for p in backbone.model.parameters())


def test_a_run_is_whole_and_can_be_evaluated(run, backbone, data):
    assert {p.name for p in run.adapter_dir.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "history.csv", "task.json", "training.json"}
    assert run.history[run.history.step > 0].score.max() == run.validation_score
    assert not run.adapter_dir.with_name(".adapter-checkpoints").exists()
    record = json.loads((run.adapter_dir / "training.json").read_text())
    assert record["training"]["steps"] == 8 and record["chosen_step"] == run.chosen_step
    evaluation = evaluate(run.adapter_dir, TASK, backbone, data, split="validation")
    assert evaluation.metrics["accuracy"] == pytest.approx(run.validation_score)
    assert evaluation.metrics["n"] == len(evaluation.predictions) == 16


def test_the_chosen_step_is_the_best_on_validation(run, backbone, data):
    scores = run.history.dropna(subset=["score"]).set_index("step").score
    assert list(scores.index) == [0, 2, 4, 6, 8]
    assert run.chosen_step > 0 and scores[run.chosen_step] == scores[scores.index > 0].max(), "the start is validated, and never kept"


def test_validating_the_start_changes_no_bit_of_what_is_trained(run, backbone, data, tmp_path, monkeypatch):
    evaluate = PromptTrainer.evaluate
    monkeypatch.setattr(PromptTrainer, "evaluate", lambda self, **_: evaluate(self) if self.state.global_step else {})
    without = train(TASK, "ept", 0, backbone, data, tmp_path / "a", training=CONFIG, sizes=SIZES, progress=False)
    assert list(without.history.step) == list(run.history.step[1:])
    assert (without.adapter_dir / "adapter_model.safetensors").read_bytes() == (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def test_a_validation_keeps_what_happens_inside(run, backbone):
    kept = run.history.set_index("step").loc[run.chosen_step]
    inside = EPTModel.from_pretrained(backbone.model, run.adapter_dir).prompt.inside()
    assert set(inside) == {"strength", "fusion", "projection", "offset", "gate_entropy"} and dict(kept[list(inside)]) == pytest.approx(inside)
    start = run.history.set_index("step").loc[0]
    assert [start[name] for name in inside] == [0, 0, 0, 0, pytest.approx(1)] and kept.fusion > 0


@pytest.mark.parametrize("method, groups", [("ept", ["modules", "pair", "prompt"]), ("dept", ["pair", "prompt"]), ("pt", ["prompt"]), ("lora", ["weights"])])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_reach_is_the_sum_of_the_rates_that_were_used(method, groups, warmup, data, tmp_path, monkeypatch):
    used, step = [], PromptTrainer.training_step

    def counting(self, *args, **options):
        used.append({group["name"]: group["lr"] for group in self.optimizer.param_groups})
        return step(self, *args, **options)

    monkeypatch.setattr(PromptTrainer, "training_step", counting)
    config = replace(CONFIG, warmup_steps=warmup)
    run = train(TASK, method, 0, tiny_backbone("t5"), data, tmp_path / "a", training=config, sizes=SIZES | SMALL, progress=False)
    reach = run.history.set_index("step").filter(like="reach_")
    assert list(reach.columns) == [f"reach_{group}" for group in groups]
    for row in reach.dropna().itertuples():
        assert row[1:] == pytest.approx([sum(rates[group] for rates in used[: row.Index]) for group in groups])


def test_modules_that_stay_at_their_start_are_marked(data, tmp_path):
    marked = lambda run: (modules_moved(run.history), "modules stayed at their start" in run._repr_markdown_())
    options = dict(sizes=SIZES, progress=False)
    for rate, moved in ((0.1, True), (1e-6, False)):
        config = replace(CONFIG, module_learning_rate=rate)
        assert marked(train(TASK, "ept", 0, tiny_backbone("t5"), data, tmp_path / str(moved), training=config, **options)) == (moved, not moved)
    assert marked(train(TASK, "dept", 0, tiny_backbone("t5"), data, tmp_path / "dept", training=CONFIG, **options)) == (None, False)


@pytest.mark.parametrize("part, least", [("fusion", 0.01), ("projection", 0.01), ("gate_entropy", 0.99)])
def test_each_part_alone_can_have_moved(part, least):
    still = {"step": [0, 10, 20], "score": [50, 60, 60], "fusion": [0.0] * 3, "projection": [0.0] * 3, "gate_entropy": [1.0] * 3}
    beyond = 2 * least - (part == "gate_entropy")
    assert modules_moved(still) is False
    assert modules_moved(still | {part: [still[part][0], beyond, still[part][0]]}), "of equal scores the first is kept"
    assert modules_moved(still | {part: [still[part][0], still[part][0], beyond]}) is False
    assert modules_moved({name: still[name] for name in ("step", "score", part)}) is False, "the other parts may be missing"
    assert modules_moved({"step": [0, 10], "score": [50, 60], "offset": [0, 1]}) is None
    assert modules_moved({"step": [10, 20], "score": [50, 60], part: [None, None]}) is None


def test_a_record_can_hold_a_history_and_says_the_same_of_it(run):
    file = run.adapter_dir / "history.csv"
    file.write_text(run.history.assign(offset=float("inf")).to_csv(index=False))
    history = json.loads(compact_json(_saved(run.adapter_dir)[1]))
    assert list(history) == list(run.history) and history["loss"][0] is None and set(history["offset"]) == {None}
    assert modules_moved(history) is modules_moved(run.history) is not None


def test_speed_is_about_what_a_run_keeps(run):
    history = run.history.dropna(subset=["score"])
    assert at_shares(run.history, 8)[1] == run.validation_score
    assert steps_to(run.history, run.validation_score) <= run.chosen_step
    assert history.score[1:].min() <= area_under(run.history, 8) <= history.score.max()
    record = {name: [None if pd.isna(v) else v for v in values] for name, values in run.history.items()}
    assert area_under(record, 8) == area_under(run.history, 8) and at_shares(record, 8) == at_shares(run.history, 8)
    empty = {"step": [], "loss": [], "score": []}
    assert steps_to(empty, 50) is None and pd.isna(area_under(empty, 8)) and pd.isna(at_shares(empty, 8)[1])


def test_who_learns_sooner_has_more_area():
    slow, fast = ({"step": [0, 10, 20], "score": [50, middle, 90]} for middle in (60, 80))
    assert area_under(slow, 20) < area_under(fast, 20) < 90 == area_under({"step": [0, 20], "score": [90, 90]}, 20)
    assert area_under(fast, 20) == area_under(fast | {"score": [50, 80, 90], "loss": [None, 1, 2]}, 20) < area_under(fast, 40)
    assert steps_to(fast, 80) == 10 < steps_to(slow, 80)


def test_a_tiny_model_learns(data, tmp_path):
    config = TrainingConfig(steps=60, batch_size=8, evaluate_every=20, learning_rate=0.5)
    run = train(TASK, "pt", 0, tiny_backbone("llama"), data, tmp_path / "a", training=config, sizes=SIZES, progress=False)
    assert run.history.loss.dropna().iloc[-1] < run.history.loss.dropna().iloc[0]


COMPARED = [name for name, method in METHODS.items() if method.kind is not SoftPrompt]
SMALL = dict(residual_width=5, attention_width=7, adapter_width=3, lora_rank=2)


def sources(length=60):
    generator = torch.Generator().manual_seed(2)
    return {task: torch.randn(length, WIDTH, generator=generator) for task in (*SOURCE_TASKS, SHARED)}


@pytest.mark.parametrize("method", COMPARED)
def test_every_method_is_trained_and_evaluated_by_the_same_road(method, backbone, data, tmp_path):
    before = copy.deepcopy(backbone.model.state_dict())
    run = train(TASK, method, 0, backbone, data, tmp_path / "a", training=CONFIG, sizes=SIZES | SMALL, source_prompts=sources(), progress=False)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert evaluate(run.adapter_dir, TASK, backbone, data, split="validation").metrics["accuracy"] == pytest.approx(run.validation_score)
    record = json.loads((run.adapter_dir / "training.json").read_text())
    assert record["trainable_parameters"] == run.trainable_parameters > 0
    assert list(record.get("source_prompts", {})) == list(METHODS[method].used(sources()))


def test_the_weights_have_a_learning_rate_of_their_own(backbone):
    config = TrainingConfig(learning_rate=0.3, weight_learning_rate=0.002, module_learning_rate=0.1)
    rates = lambda method: {(group["name"], group["lr"]) for group in optimizer_groups(build_method(method, backbone.model, source_prompts=sources(), **SIZES | SMALL), config)}
    for method in ("finetune", "adapter", "adapterdrop", "bitfit", "lora"):
        assert rates(method) == {("weights", 0.002)}
    for method in ("attempt", "mpt", "respt"):
        assert rates(method) == {("prompt", 0.3), ("modules", 0.1)}
    assert rates("spot") == {("prompt", 0.3)}


def test_sources_are_runs_of_prompt_tuning(data, tmp_path):
    backbone = tiny_backbone("t5")
    options = dict(training=CONFIG, sizes=SIZES, progress=False)
    for name in ("mnli", "qnli"):
        train(TASK, "pt", 0, backbone, data, tmp_path / name, **options)
    folders = {name: tmp_path / name for name in ("mnli", "qnli")}
    one = train(TASK, "attempt", 0, backbone, data, tmp_path / "a", source_prompts=folders, **options)
    spot = train(TASK, "spot", 0, backbone, data, tmp_path / "s", source_prompts=folders, **options)
    recorded = [json.loads((run.adapter_dir / "training.json").read_text())["source_prompts"] for run in (one, spot)]
    assert list(recorded[0]) == ["mnli", "qnli"] and recorded[1] == {"mnli": recorded[0]["mnli"]}
    with pytest.raises(ValueError, match="'mnli' is among its own source prompts; pass those of other tasks: qnli, qqp, sst2, boolq, multirc"):
        train("mnli", "attempt", 0, backbone, data, tmp_path / "b", source_prompts=folders, **options)
    with pytest.raises(ValueError, match="method 'mpt' starts from a prompt that source tasks share, and none is given"):
        train(TASK, "mpt", 0, backbone, data, tmp_path / "b", **options)


def test_fine_tuning_of_a_bfloat16_backbone_is_float32(data, tmp_path):
    backbone = tiny_backbone("t5")
    backbone.model.to(torch.bfloat16)
    run = train(TASK, "finetune", 0, backbone, data, tmp_path / "a", training=CONFIG, sizes=SIZES, progress=False)
    assert run.cost["precision"] == "float32"
    assert {t.dtype for t in load_file(run.adapter_dir / "adapter_model.safetensors").values()} == {torch.float32}
    assert evaluate(run.adapter_dir, TASK, backbone, data, split="validation").metrics["accuracy"] == pytest.approx(run.validation_score)


def test_what_is_trained_remembers_the_role_of_its_method_whatever_it_is_called(backbone, data, tmp_path):
    for method in (replace(METHODS["ept"], name="novel"), METHODS["ept-one-space"], METHODS["dept"]):
        run = train(TASK, method, 0, backbone, data, tmp_path / method.name, training=CONFIG, sizes=SIZES, progress=False)
        saved = json.loads((run.adapter_dir / "training.json").read_text())
        assert (saved["method"], saved["role"]) == (method.name, method.role)


class Stopped(Exception):
    "Stands for a process that is killed."


def once_a_night(method):
    """Variants of `ept` differ from it in what a prompt computes, not in how it is trained."""
    return [pytest.mark.slow] if "ept-" in method else []


@pytest.mark.parametrize("method, stop_at", [("ept", 3), ("ept", 4), ("ept", 7), *(pytest.param(method, 4, marks=once_a_night(method)) for method in COMPARED)])
def test_a_stopped_run_ends_with_the_same_bits(method, stop_at, backbone, data, tmp_path, monkeypatch):
    options = dict(training=CONFIG, sizes=SIZES | SMALL, source_prompts=sources(), progress=False)
    whole = train(TASK, method, 0, backbone, data, tmp_path / "whole", **options)
    steps, step = [], PromptTrainer.training_step

    def stopping(self, *args, **keywords):
        steps.append(self.state.global_step)
        if len(steps) == stop_at:
            raise Stopped
        return step(self, *args, **keywords)

    monkeypatch.setattr(PromptTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train(TASK, method, 0, backbone, data, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped").exists()
    resumed = train(TASK, method, 0, backbone, data, tmp_path / "stopped", **options)
    assert steps[stop_at] == (stop_at - 1) // 2 * 2, "the second run goes on from the last checkpoint"
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json", "history.csv"):
        assert (whole.adapter_dir / name).read_bytes() == (resumed.adapter_dir / name).read_bytes(), name


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A training that was killed behind its third checkpoint, and what it would have become: arguments, folder of checkpoints, adapter."""
    folder, step = tmp_path_factory.mktemp("interrupted"), PromptTrainer.training_step
    rows = [{"text": f"{w} {n}", "label": int(w == "red")} for n in range(8) for w in ("red", "blue")]
    data = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    arguments = (TASK, "ept", 0, tiny_backbone("t5"), data)
    options = dict(training=replace(CONFIG, learning_rate=1e-30, pair_learning_rate=1e-30), sizes=SIZES, progress=False)  # the first validation is the best

    def stopping(self, *arguments, **keywords):
        if self.state.global_step == 6:
            raise Stopped
        return step(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train(*arguments, folder / "stopped", folder / "checkpoints", **options)
    whole = train(*arguments, folder / "whole", **options)
    return lambda place, checkpoints: train(*arguments, place, checkpoints, **options), folder / "checkpoints", whole.adapter_dir


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "whole.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, cut, lambda file: file.unlink()], ids=["flipped", "cut", "missing"])
def test_a_checkpoint_that_is_not_what_was_written_is_dropped_with_a_line(interrupted, tmp_path, caplog, file, damage):
    shutil.copytree(interrupted[1], tmp_path / "c")
    before, newest = tmp_path / "c" / "checkpoint-2", tmp_path / "c" / "checkpoint-6"
    run = json.loads((newest / "whole.json").read_text())["run"]
    damage(newest / file)
    assert last_checkpoint(tmp_path / "c", run)[0] == before and not newest.exists()
    told = [record.getMessage() for record in caplog.records]
    assert [text.startswith(f"{newest} is dropped: {file}") for text in told] == [True] * (file != "whole.json" or "lambda" not in damage.__name__)


def test_a_damaged_checkpoint_changes_no_bit(interrupted, tmp_path):
    resume, checkpoints, whole = interrupted
    shutil.copytree(checkpoints, tmp_path / "c")
    (tmp_path / "c" / "checkpoint-6" / "optimizer.pt").unlink()
    run = resume(tmp_path / "a", tmp_path / "c")
    assert {p.name: p.read_bytes() for p in run.adapter_dir.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_best_checkpoint_is_needed_too(interrupted, tmp_path, caplog, monkeypatch):
    resume, checkpoints, whole = interrupted
    shutil.copytree(checkpoints, tmp_path / "c")
    flip(tmp_path / "c" / "checkpoint-2" / "adapter_model.safetensors")
    run = resume(tmp_path / "a", tmp_path / "c")
    assert (run.adapter_dir / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert any("checkpoint-2, the best until then, is gone" in record.getMessage() for record in caplog.records)


def test_checkpoints_may_move_with_their_folder(interrupted, tmp_path):
    """The Trainer writes their path down."""
    resume, checkpoints, whole = interrupted
    shutil.copytree(checkpoints, tmp_path / "elsewhere")
    run = resume(tmp_path / "a", tmp_path / "elsewhere")
    assert {p.name: p.read_bytes() for p in run.adapter_dir.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_executed(interrupted, tmp_path, file):
    """Not even where its seal was made for it."""
    resume, checkpoints, _ = interrupted
    shutil.copytree(checkpoints, tmp_path / "c")
    newest = tmp_path / "c" / "checkpoint-6"
    torch.save(Harmful(), newest / file)
    seal = json.loads((newest / "whole.json").read_text())
    seal_checkpoint(newest, seal["run"], seal["seconds"])
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        resume(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "a").exists()


def test_a_half_written_checkpoint_does_not_count(interrupted, tmp_path, caplog):
    resume, _, whole = interrupted
    broken = tmp_path / "checkpoints" / "checkpoint-6"
    broken.mkdir(parents=True)
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    (broken.with_name("checkpoint-x")).mkdir()
    run = resume(tmp_path / "a", tmp_path / "checkpoints")
    assert (run.adapter_dir / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert not caplog.records


def test_checkpoints_of_another_configuration_are_not_continued(interrupted, tmp_path):
    shutil.copytree(interrupted[1], tmp_path / "c")
    run = json.loads((tmp_path / "c" / "checkpoint-6" / "whole.json").read_text())["run"]
    assert last_checkpoint(tmp_path / "c", run)[0].name == "checkpoint-6"
    assert last_checkpoint(tmp_path / "c", "other") == (None, 0.0) and not list((tmp_path / "c").glob("checkpoint-*"))


def test_a_training_that_ended_is_not_made_again_because_its_last_files_could_not_be_written(interrupted, tmp_path, monkeypatch):
    resume, checkpoints, whole = interrupted
    shutil.copytree(checkpoints, tmp_path / ".a-checkpoints")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", full)
        with pytest.raises(OSError, match="No space left on device: '.*a'"):
            resume(tmp_path / "a", None)
    assert [p.name for p in tmp_path.iterdir()] == [".a-checkpoints"]
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "training_step", None)
        run = resume(tmp_path / "a", None)
    assert {p.name: p.read_bytes() for p in run.adapter_dir.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "the checkpoints go last"


def test_two_trainings_of_one_run_at_once_lose_nothing(interrupted, tmp_path, caplog, monkeypatch):
    """The second waits, says for whom, and finds the work done."""
    resume, checkpoints, whole = interrupted
    shutil.copytree(checkpoints, tmp_path / "c")
    step, begun, steps = PromptTrainer.training_step, threading.Event(), []

    def slow(self, *arguments, **keywords):
        begun.set()
        steps.append(self.state.global_step)
        wait_until(lambda: any("at work" in record.getMessage() for record in caplog.records))  # until the second waits
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(PromptTrainer, "training_step", slow)
    first = threading.Thread(target=resume, args=(tmp_path / "a", tmp_path / "c"))
    first.start()
    assert begun.wait(60)
    second = resume(tmp_path / "b", tmp_path / "c")
    first.join()
    assert steps == [6, 7]
    assert [f"process {os.getpid()} on " in r.getMessage() and "this one waits for its end" in r.getMessage() for r in caplog.records if "at work" in r.getMessage()] == [True]
    for folder in (tmp_path / "a", second.adapter_dir):
        assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    loss = PromptTrainer.compute_loss
    count = []

    def breaking(self, *args, **options):
        count.append(1)
        return loss(self, *args, **options) * (float("nan") if len(count) == 6 else 1)

    monkeypatch.setattr(PromptTrainer, "compute_loss", breaking)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 6; the last good checkpoint is kept"):
        train(TASK, "pt", 0, tiny_backbone("t5"), data, tmp_path / "a", tmp_path / "c", training=CONFIG, sizes=SIZES, progress=False)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "c" / "checkpoint-4" / "whole.json").exists()
    kept = EPTModel.from_pretrained(tiny_backbone("t5").model, tmp_path / "c" / "checkpoint-4")
    assert all(torch.isfinite(p).all() for p in kept.prompt.parameters())


def test_a_prompt_that_is_no_longer_finite_is_not_saved(data, tmp_path, monkeypatch):
    step = PromptTrainer.training_step

    def breaking(self, model, *args, **options):
        result = step(self, model, *args, **options)
        if self.state.global_step == 3:
            model.prompt.embeddings.grad.fill_(float("nan"))
        return result

    monkeypatch.setattr(PromptTrainer, "training_step", breaking)
    with pytest.raises(NonFiniteLoss):
        train(TASK, "pt", 0, tiny_backbone("t5"), data, tmp_path / "a", tmp_path / "c", training=CONFIG, sizes=SIZES, progress=False)
    assert [p.name for p in sorted((tmp_path / "c").glob("checkpoint-*")) if (p / "whole.json").exists()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "changes, message",
    [({"steps": 0}, "steps is 0; it must be at least 1"), ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0")],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_names_are_checked_before_anything_trains(data, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'etp'; did you mean 'ept'?"):
        train(TASK, "etp", 0, tiny_backbone("t5"), data, tmp_path / "a")
    with pytest.raises(ValueError, match="unknown task 'qnl'; did you mean 'qnli'?"):
        train("qnl", "ept", 0, tiny_backbone("t5"), data, tmp_path / "a")
    with pytest.raises(ValueError, match="unknown parameter 'sizes.space'; did you mean 'spaces'?"):
        train(TASK, "ept", 0, tiny_backbone("t5"), data, tmp_path / "a", sizes={"space": 4})
    assert not list(tmp_path.iterdir())


def test_the_library_serves_a_users_own_table(tmp_path):
    from ept.data.loading import load_task

    frame = pd.DataFrame([{"text": f"{w} {n}", "label": (w == "red" and "yes") or "no"} for n in range(20) for w in ("red", "blue")])
    data = load_task(TASK, source=frame)
    run = train(TASK, "dept", 1, tiny_backbone("t5"), data, tmp_path / "a", training=CONFIG, sizes=SIZES, progress=False)
    assert evaluate(run.adapter_dir, TASK, tiny_backbone("t5"), data).metrics["n"] == len(data["test"])


def test_processors_that_share_a_name_are_told_apart(monkeypatch):
    from ept.training import training

    described, read = {}, training.Path.read_text
    monkeypatch.setattr(training.Path, "read_text", lambda self, *given, **more: described["cpu"] if str(self) == "/proc/cpuinfo" else read(self, *given, **more))
    monkeypatch.setattr(training.Path, "exists", lambda self: True)
    names = []
    for family, model in ((25, 17), (25, 1), (23, 17)):
        described["cpu"] = f"processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n" * 2
        names.append(training._processor(torch.device("cpu")))
    assert len(set(names)) == 3 and all(name.startswith("AMD EPYC (") for name in names)
    described["cpu"] = "processor\t: 0\nmodel name\t: ARM core\n"
    assert training._processor(torch.device("cpu")).startswith("ARM core, ")
    described["cpu"] = "processor\t: 0\nBogoMIPS\t: 50.00\n"
    assert training._processor(torch.device("cpu")).startswith(training.platform.processor() or training.platform.machine())
