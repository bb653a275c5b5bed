"""Every fast path against the plain one: the same numbers in float32, the same answers in bfloat16.

Where a path is held elsewhere: the shared prefix with its gradients and the labelled logits in test_battery.py, the weights in
bfloat16 in test_backbone.py, batches whose order a seed fixes in test_training.py and its notebook.
"""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from ept.data.encoding import Encoder
from ept.data.loading import load_task
from ept.data.metrics import score_task
from ept.data.tasks import get_task
from ept.methods.registry import build_method
from ept.model.backbone import keep_freed_memory, load_backbone
from ept.model.modeling import EPTModel
from ept.training.batching import collate
from ept.training.config import TrainingConfig
from ept.training.ranking import predict, rank_labels
from ept.training.training import train
from ept.utils.files import repository_root
from tests.conftest import perturbed

SIZES = dict(prompt_length=40, short_length=6, max_length=40, spaces=3, space_width=1, fusion_width=2, seed=3)
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture
def model(backbone):
    """EPT with every trainable parameter changed, as training would."""
    return perturbed(build_method("ept", backbone.model, **SIZES))


def examples(lengths, family):
    chance = random.Random(0)
    draw = lambda n: [chance.randrange(3, 300) for _ in range(n)]
    return [draw(n) for n in lengths], [draw(1) + ([] if family == "decoder-only" else [1]) for _ in lengths]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same(ours, plain):
    for one, other in zip(ours, plain, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_close(ours[0], plain[0], **CLOSE)


def test_lengths_in_multiples_of_eight_change_neither_loss_nor_gradient(model):
    texts, targets = examples((5, 9, 11), model.family)
    padded = collate(texts, targets, model.family, 0)
    longest = max(int(m.sum()) for m in padded["attention_mask"])
    assert padded["input_ids"].shape[1] % 8 == 0 and padded["input_ids"].shape[1] > longest
    plain = {**padded, "input_ids": padded["input_ids"][:, :longest], "attention_mask": padded["attention_mask"][:, :longest]}
    if model.family == "decoder-only":
        plain["labels"] = padded["labels"][:, :longest]
    assert_same(loss_and_gradients(model, padded), loss_and_gradients(model, plain))


def test_a_batch_by_length_gives_each_example_what_it_gets_alone(model):
    texts, targets = examples((4, 4, 13), model.family)
    together = loss_and_gradients(model, collate(texts, targets, model.family, 0))
    alone = [loss_and_gradients(model, collate([x], [y], model.family, 0)) for x, y in zip(texts, targets)]
    assert_same(together, [torch.stack(parts).mean(0) for parts in zip(*alone)])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_kernels_agree(model, implementation):
    texts, targets = examples((6, 10), model.family)
    batch = collate(texts, targets, model.family, 0)
    plain = loss_and_gradients(model, batch)
    model.backbone.set_attn_implementation(implementation)
    assert_same(loss_and_gradients(model, batch), plain)


def test_no_dropout_in_the_backbone(backbone):
    backbone.model.config.dropout_rate = 0.5
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = build_method("ept", backbone.model, **SIZES)
    batch = collate(*examples((6, 10), model.family), model.family, 0)
    assert_same(loss_and_gradients(model.train(), batch), loss_and_gradients(model.eval(), batch))


def test_no_gradient_is_kept_for_the_backbone(model):
    """No autograd bookkeeping beyond what the prompt needs: frozen weights get none, and scoring builds no graph."""
    batch = collate(*examples((6, 10), model.family), model.family, 0)
    loss_and_gradients(model, batch)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert not model.score(batch["input_ids"], batch["attention_mask"], candidates=[[5]]).requires_grad


def test_sorted_batches_rank_as_one_text_at_a_time(model):
    texts, _ = examples([random.Random(1).randrange(3, 30) for _ in range(40)], model.family)
    candidates = [[5, 1], [7, 8, 1], [9]]
    sorted_ones = rank_labels(model, texts, candidates, tokens=100)
    alone = torch.cat([model.score(torch.tensor([text]), candidates=candidates) for text in texts])
    assert_close(sorted_ones, alone, **CLOSE)


def test_folding_is_exact(model):
    batch = collate(*examples((6, 10), model.family), model.family, 0)
    asked = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], candidates=[[5, 1], [9]])
    assert_close(model.fold().score(**asked), model.score(**asked), **CLOSE)


def test_kept_memory_changes_no_bit(model):
    batch = collate(*examples((6, 10), model.family), model.family, 0)
    before = loss_and_gradients(model, batch)
    keep_freed_memory()
    assert all(torch.equal(a, b) for a, b in zip(before, loss_and_gradients(model, batch)))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded backbone, from DVC's store in the clone."""
    root, folder = repository_root(), tmp_path_factory.mktemp("embedded")
    stored = lambda md5: root / "store" / "files" / "md5" / md5[:2] / md5[2:]
    for entry in json.loads(stored(yaml.safe_load((root / "backbone.dvc").read_text())["outs"][0]["md5"]).read_text()):
        shutil.copy(stored(entry["md5"]), folder / entry["relpath"])
    return folder


@pytest.mark.slow
def test_bfloat16_gives_the_answers_of_float32_on_a_trained_task(embedded, tmp_path):
    """Trained in float32, asked in both: nearly every answer is the same, and the score moves less than its noise."""
    full, half = (load_backbone(str(embedded), device="cpu", precision=p) for p in ("float32", "bfloat16"))
    task, data = get_task("stsb"), load_task("stsb")
    run = train(task, "ept", 0, full, data, tmp_path / "adapter", training=TrainingConfig(steps=100, evaluate_every=50), sizes={"max_length": 64}, progress=False)
    encoder = Encoder(task, full.tokenizer, full.style, 64)
    texts, labels = encoder.encode(data["test"]), data["test"]["label"]
    scores = [rank_labels(EPTModel.from_pretrained(b.model, run.adapter_dir), texts, encoder.candidates) for b in (full, half)]
    answers = [predict(task, s) for s in scores]
    plain, fast = (score_task(task, a, labels)["pearson"] for a in answers)
    assert plain > 40, "the task has been learned"
    assert abs(plain - fast) < 100 / np.sqrt(len(labels)), "less than a standard error"
    assert np.corrcoef(answers)[0, 1] > 0.98
