"""What only a CUDA device can show: `python -m pytest -m gpu`. The battery runs there too: `EPT_TEST_DEVICE=cuda python -m pytest tests/test_battery.py`."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch.testing import assert_close

from ept.methods.registry import METHODS
from ept.model.backbone import load_backbone, resolve_device, resolve_precision
from ept.model.bank import PromptBank
from ept.model.modeling import EPTModel
from ept.training.evaluation import evaluate
from ept.training.trainer import PromptTrainer
from ept.training.training import train
from tests.conftest import perturbed, tiny_backbone
from tests.test_battery import CANDIDATES, build, inputs, labels_for, only
from tests.test_training import CONFIG, SIZES, TASK, Stopped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
trainable = only(lambda method: method.trained)
some = pytest.mark.parametrize("name", ["ept", "dept", "pt", "adept", "lora", "bitfit", "finetune"])


@pytest.fixture
def data():
    rows = [{"text": f"{w} {n}", "label": int(w == "red")} for n in range(8) for w in ("red", "blue")]
    return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation", "test")})


@pytest.fixture(params=["t5", "llama", "gpt2"])
def pair(request):
    """The same tiny backbone on the CPU and on the device."""
    here = tiny_backbone(request.param)
    here.model.cpu()
    return here, replace(here, model=copy.deepcopy(here.model).to("cuda"))


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def a_step(model, device):
    """Scores, loss and gradients of one batch, on the CPU."""
    batch = inputs()
    batch["labels"] = labels_for(model, batch)
    batch = on(device, batch)
    scores = model.score(batch["input_ids"], batch["attention_mask"], candidates=CANDIDATES)
    loss = model.train()(**batch, only_labelled=True).loss
    loss.backward()
    return [scores.cpu(), loss.detach().cpu()], {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@trainable
def test_a_step_is_that_of_the_cpu(method, pair):
    """Scores, loss, and each gradient, in float32; the sums are added in another order."""
    (found, gradients), (expected, theirs) = (a_step(perturbed(build(method, one.model).cpu()).to(device), device) for one, device in zip(pair, ("cpu", "cuda")))
    for one, other in zip(found, expected):
        assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-6, name


def waits(run):
    """How often the host waits for the device in a function."""
    run()  # what is prepared at a first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message).partition("\n")[0] for w in caught if "synchroniz" in str(w.message)]


@trainable
def test_a_step_waits_a_few_times_at_most(method, pair):
    """The host must run ahead of the device. On an H100 a bare backbone waits twice, with a prompt four times, with an adapter or a prompt that reads the text six times."""
    backbone = pair[1].model
    model, batch = build(method, backbone).train(), on("cuda", inputs())
    labels = labels_for(model, batch).to("cuda")
    embedded = backbone.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    plain = {"labels": labels} if model.family == "encoder-decoder" else {}

    def bare():
        backbone(inputs_embeds=embedded, attention_mask=batch["attention_mask"], **plain).logits.sum().backward()

    def ours():
        model(**batch, labels=labels, only_labelled=True).loss.backward()

    assert len(waits(ours)) <= len(waits(bare)) + 4, waits(ours)


def test_auto_takes_the_device_and_bfloat16(tmp_path):
    backbone = tiny_backbone("llama")
    backbone.model.cpu().save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    assert resolve_device().type == "cuda"
    assert resolve_precision("auto", resolve_device(), 1) == torch.bfloat16
    found = load_backbone(str(tmp_path))
    assert found.model.device.type == "cuda" and found.model.dtype == torch.bfloat16


@some
def test_what_is_trained_there_is_used_anywhere(name, pair, data, tmp_path):
    here, there = pair
    run = train(TASK, name, 0, there, data, tmp_path / "adapter", training=CONFIG, sizes=SIZES, progress=False)
    assert run.cost["device"].startswith("cuda") and run.cost["processor"] == torch.cuda.get_device_name() and run.cost["peak_memory_bytes"] > 0
    assert evaluate(run.adapter_dir, TASK, there, data, split="validation").score == pytest.approx(run.validation_score)
    found = [EPTModel.from_pretrained(one.model, run.adapter_dir).score(**on(one.model.device, inputs()), candidates=CANDIDATES).cpu() for one in pair]
    assert_close(*found, rtol=1e-4, atol=1e-4)
    assert evaluate(run.adapter_dir, TASK, here, data, split="validation").score == pytest.approx(run.validation_score, abs=100 / 16)


@some
def test_a_stopped_run_ends_with_the_same_numbers(name, pair, data, tmp_path, monkeypatch):
    options = dict(training=CONFIG, sizes=SIZES, progress=False)
    whole = train(TASK, name, 0, pair[1], data, tmp_path / "whole", **options)
    step = PromptTrainer.training_step

    def stopping(self, *arguments, **keywords):
        if self.state.global_step == 5:
            raise Stopped
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PromptTrainer, "training_step", stopping)
        train(TASK, name, 0, pair[1], data, tmp_path / "stopped", **options)
    resumed = train(TASK, name, 0, pair[1], data, tmp_path / "stopped", **options)
    found, expected = (load_file(run.adapter_dir / "adapter_model.safetensors") for run in (resumed, whole))
    for tensor in expected:  # of 21 such runs on an H100, 17 ended with the same bits: some kernels add in whatever order they come
        assert_close(found[tensor], expected[tensor], rtol=1e-3, atol=1e-5)
    assert resumed.history.step.tolist() == whole.history.step.tolist()


@pytest.mark.parametrize("name", ["ept", "pt", "lora"])
def test_recomputation_changes_no_loss(name, pair, data, tmp_path):
    options = dict(training=CONFIG, sizes=SIZES, progress=False)
    kept, recomputed = (train(TASK, name, 0, pair[1], data, tmp_path / str(again), gradient_checkpointing=again, **options).history.loss.dropna() for again in (False, True))
    assert_close(torch.tensor(kept.tolist()), torch.tensor(recomputed.tolist()), rtol=1e-4, atol=1e-5)


def test_many_prompts_serve_one_batch(pair):
    names, batch = ("ept", "pt", "dept"), on("cuda", inputs(lengths=(4, 7, 5)))
    models = {name: perturbed(build(METHODS[name], pair[1].model)) for name in names}
    bank = PromptBank(pair[1].model, {name: model.fold() for name, model in models.items()})
    together = bank.score(names, **batch, candidates=CANDIDATES)
    for row, name in enumerate(names):
        alone = models[name].score(**{key: value[row : row + 1] for key, value in batch.items()}, candidates=CANDIDATES)
        assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
