"""The prompt that source tasks share: what it is trained by, what it leaves alone, what it becomes."""

import copy
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.testing import assert_close

from ept.data.tasks import Task
from ept.methods.catalogue import SHARED
from ept.methods.registry import build_method
from ept.methods.sources import read_sources
from ept.model.modeling import EPTModel
from ept.training.config import TrainingConfig
from ept.training.distillation import Student, plan_mixture, share_prompt
from ept.training.trainer import PromptTrainer
from ept.training.training import train
from tests.conftest import WIDTH, tiny_backbone

LENGTH = 6
SIZES = dict(prompt_length=LENGTH, short_length=LENGTH, max_length=48)
CONFIG = TrainingConfig(steps=6, batch_size=6, evaluate_every=2, learning_rate=0.1, module_learning_rate=0.03)
TASKS = {name: Task(name, fields=("text",), labels=("no", "yes")) for name in ("red", "blue", "green")}


def rows(word, number=12):
    found = Dataset.from_list([{"text": f"{colour} {n}", "label": int(colour == word)} for n in range(number // 3) for colour in TASKS])
    return DatasetDict({"train": found, "validation": found})


DATA = {"red": rows("red"), "blue": rows("blue", 24), "green": rows("green")}


def teachers(tasks=TASKS):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(LENGTH, WIDTH, generator=generator) for name in tasks}


def student(backbone, weight=0.9):
    prompt = build_method("mpt", backbone.model, source_prompts={SHARED: torch.zeros(LENGTH, WIDTH)}, **SIZES).prompt
    several = type(prompt)(prompt.config, teachers()["red"], tasks=3)
    return Student(backbone.model, several, torch.stack(list(teachers().values())), weight)


def batch(model, tasks=(0, 1, 2)):
    """Rows of several tasks, of different lengths."""
    ids, mask = torch.tensor([[40, 41, 42, 43], [50, 51, 52, 0], [60, 61, 62, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    answers = [[70, 71], [72, -100], [73, -100]]
    labels = answers if model.family == "encoder-decoder" else [[-100, -100, *row[:1], *row[1:]] for row in answers]
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels), "tasks": torch.tensor(tasks)}


# ---- the loss -----------------------------------------------------------------------------------------------------------


def test_gradients_belong_to_the_student_alone(backbone):
    model = student(backbone)
    model(**batch(model)).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if name.startswith("prompt.")}
    assert not model.teachers.requires_grad and model.teachers.grad is None and "teachers" not in model.adapter_tensors()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if name.startswith("prompt."))


def test_each_row_is_read_under_the_prompt_of_its_own_task(backbone):
    """A student that is the teacher of its task has the task's own loss and no other."""
    model, generator = student(backbone), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (model.prompt.product.prefix_task_cols, model.prompt.product.prefix_task_rows):
            parameter.uniform_(0.5, 1.5, generator=generator)
        model.teachers.copy_(model.prompt.prompts(torch.arange(3)))
    given = batch(model)
    alone = copy.deepcopy(model)
    alone.weight = 0.0
    assert_close(model(**given).loss, alone(**given).loss)
    other = model(**given | {"tasks": torch.tensor([1, 2, 0])})
    assert not torch.allclose(other.logits, model(**given).logits)
    for row in range(3):
        model.prompt.task = row
        plain = EPTModel.forward(model, given["input_ids"][[row]], given["attention_mask"][[row]], given["labels"][[row]], only_labelled=True)
        assert_close(model(**{name: tensor[[row]] for name, tensor in given.items()}).loss, plain.loss, rtol=1e-4, atol=1e-5)


def test_imitation_is_weighed(backbone):
    losses = []
    for weight in (0.0, 1.0, 2.0):
        model = student(backbone, weight)
        losses.append(model(**batch(model)).loss.item())
    assert losses[0] < losses[1] < losses[2] and losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.9, 20.0])
def test_steps_lower_the_loss(weight, backbone):
    """And what is imitated, where that is most of the loss."""
    model, own = student(backbone, weight), student(backbone, 0.0)
    own.prompt = model.prompt
    given, optimizer = batch(model), torch.optim.AdamW(model.prompt.parameters(), lr=0.05)
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = model(**given).loss
        losses.append((loss.item(), loss.item() - own(**given).loss.item()))
        loss.backward()
        optimizer.step()
    (before, imitated_before), (after, imitated_after) = losses[0], losses[-1]
    assert after < before and (weight < 20 or imitated_after < 0.8 * imitated_before)


# ---- the mixture --------------------------------------------------------------------------------------------------------


def test_every_batch_has_rows_of_some_tasks_and_every_row_has_its_turn():
    sizes, starts = [20, 5, 10], [0, 20, 25]
    plan = plan_mixture(sizes, 8, 300, seed=4)
    of = lambda index: max(k for k, start in enumerate(starts) if index >= start)
    together = {frozenset(map(of, batch)) for batch in plan}
    assert {frozenset({0, 1, 2}), frozenset({0, 2})} <= together
    counts = torch.tensor([index for batch in plan for index in batch]).bincount(minlength=35)
    assert counts.min() > 0
    for start, size in zip(starts, sizes):  # epochs: no row is two ahead of another
        own = counts[start : start + size]
        assert own.max() - own.min() <= 1
    assert counts[:20].sum() > counts[25:].sum() > counts[20:25].sum()


# ---- the training -------------------------------------------------------------------------------------------------------


def share(backbone, folder, **options):
    return share_prompt(
        **dict(source_prompts=teachers(), seed=0, backbone=backbone, data=DATA, output_dir=folder, training=CONFIG, sizes=SIZES, tasks=TASKS, progress=False) | options
    )


def test_it_becomes_what_mpt_starts_from_and_leaves_the_backbone_alone(backbone, tmp_path):
    before = copy.deepcopy(backbone.model.state_dict())
    run = share(backbone, tmp_path / SHARED)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert run.trainable_parameters == LENGTH * WIDTH + 3 * (LENGTH + WIDTH)
    shared = read_sources({SHARED: run.adapter_dir}, backbone.model, LENGTH)[SHARED]
    model = build_method("mpt", backbone.model, source_prompts={SHARED: run.adapter_dir}, **SIZES)
    assert torch.equal(model.prompt.product.embedding.weight, shared.prompt)
    record = json.loads((run.adapter_dir / "training.json").read_text())
    assert list(record["source_prompts"]) == list(TASKS) and record["distillation"] == 0.9
    target = train(TASKS["red"], "mpt", 0, backbone, DATA["red"], tmp_path / "red", source_prompts={SHARED: run.adapter_dir}, training=CONFIG, sizes=SIZES, progress=False)
    assert list(target.config["source_prompts"]) == [SHARED], "one for every target, a source among them"


def test_texts_are_read_as_the_teachers_have_read_them(tmp_path):
    backbone = tiny_backbone("t5")
    folders = {}
    for name, longest in (("red", 44), ("blue", 46)):
        sizes = SIZES | {"max_length": longest}
        folders[name] = train(TASKS[name], "pt", 0, backbone, DATA[name], tmp_path / name, training=CONFIG, sizes=sizes, progress=False).adapter_dir
    run = share(backbone, tmp_path / SHARED, source_prompts=folders)
    assert run.config["max_length"] == {"red": 44, "blue": 46}


class Stopped(Exception):
    "Stands for a process that is killed."


def test_a_stopped_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    backbone = tiny_backbone("t5")
    whole = share(backbone, tmp_path / "whole")
    steps, step = [], PromptTrainer.training_step

    def stopping(self, *args, **keywords):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise Stopped
        return step(self, *args, **keywords)

    monkeypatch.setattr(PromptTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        share(backbone, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    again = share(backbone, tmp_path / "stopped")
    assert steps[4:] == [2, 3, 4, 5], "it went on from the checkpoint"
    assert again.history.equals(whole.history)
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json", "history.csv"):
        assert (again.adapter_dir / name).read_bytes() == (whole.adapter_dir / name).read_bytes(), name
