"""Quantised backbones: a prompt is trained in front of them, and what is saved knows what it was trained on.

By a quantiser of twenty lines that is registered with transformers here, and by torchao where it is installed.
"""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ept import Classifier, EPTModel, Task, TrainingConfig, build_method, evaluate, load_backbone, train
from ept.model.recomputation import gradient_checkpointing
from ept.model.saving import read_record
from ept.model.weights import fingerprint, stored_tensors
from ept.training.batching import collate
from ept.use.records import describe
from tests.conftest import tiny_backbone

SIZES = dict(prompt_length=60, short_length=8, max_length=48, spaces=2, space_width=1, fusion_width=1, lora_rank=2)
TASK = Task("colour", ("text",), ("no", "yes"), ("accuracy",))
CONFIG = TrainingConfig(steps=4, batch_size=4, evaluate_every=2, learning_rate=0.1, pair_learning_rate=0.01, module_learning_rate=0.01)


@register_quantization_config("rounding")
class Rounding(QuantizationConfigMixin):
    """So many bits for each number of a linear layer, and a scale for each row."""

    def __init__(self, bits=8, quant_method="rounding"):
        self.bits, self.quant_method = bits, quant_method


class RoundedLinear(nn.Linear):
    def __init__(self, linear, bits):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        weight, self.bias = linear.weight.detach(), linear.bias
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1))
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@register_quantizer("rounding")
class RoundingQuantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self):
        return False

    def _process_model_after_weight_loading(self, model, **_):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, RoundedLinear(module, self.quantization_config.bits))


def by_torchao():
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed; pip install 'ept-prompt-tuning[quantised]'")


@pytest.fixture(params=[("rounding", Rounding), pytest.param(("torchao", by_torchao), marks=needs_torchao)], ids=lambda library: library[0])
def library(request):
    """The name of a library, and what makes a configuration of it."""
    return request.param


@pytest.fixture(scope="module", params=["t5", "llama"])
def folder(request, tmp_path_factory):
    """A tiny model as it is on the hub, with its tokenizer."""
    folder, backbone = tmp_path_factory.mktemp(request.param) / "tiny", tiny_backbone(request.param)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data():
    rows = [{"text": f"{word} {n}", "label": int(word == "red")} for n in range(6) for word in ("red", "blue")]
    return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})


@pytest.mark.parametrize("method", ["ept", "lora", "bitfit"])
def test_gradients_reach_what_is_trained(method, folder, library):
    backbone = load_backbone(folder, device="cpu", quantization_config=library[1]())
    model = build_method(method, backbone.model, **SIZES).train()
    batch = collate([[5, 6, 7] * 3, [8] * 4], [[2], [3, 4]], backbone.family, 0)

    def gradients(on):
        model.zero_grad()
        with gradient_checkpointing(model.backbone, on):
            model(**batch, only_labelled=True).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert sum(grad.abs().sum() for grad in plain.values()) > 0 and all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in plain)


def test_an_adapter_belongs_to_the_numbers_it_was_trained_on(folder, library, data, tmp_path):
    (name, config), options = library, dict(training=CONFIG, sizes=SIZES, progress=False)
    plain, small, again = (load_backbone(folder, device="cpu", quantization_config=how) for how in (None, config(), config()))
    before = fingerprint(small.model, exact=True)
    assert fingerprint(plain.model) != fingerprint(small.model) == fingerprint(again.model)
    assert f"float32, quantised by {name} on cpu" in repr(small) and "float32 on cpu" in repr(plain)
    run = train(TASK, "ept", 0, small, data, tmp_path / "small", **options)
    assert fingerprint(small.model, exact=True) == before, "the weights have stayed as they were"
    assert run.cost["precision"] == f"float32, quantised by {name}"
    for record in ("adapter_config.json", "training.json"):
        assert json.loads((run.adapter_dir / record).read_text())["backbone"]["quantization"]["quant_method"] == name
    assert f"in float32, quantised by {name}" in describe(run.adapter_dir).facts()["backbone"]
    assert evaluate(run.adapter_dir, TASK, again, data, split="validation").metrics["accuracy"] == pytest.approx(run.validation_score)
    with pytest.raises(ValueError, match=rf"quantised by {name}; this backbone's are not quantised: load it with quantization_config=.*{name}.* and precision='float32'"):
        EPTModel.from_pretrained(plain.model, run.adapter_dir)
    EPTModel.from_pretrained(plain.model, run.adapter_dir, other_weights=True)
    other = train(TASK, "pt", 0, plain, data, tmp_path / "plain", **options)
    assert all("quantization" not in (other.adapter_dir / record).read_text() for record in ("adapter_config.json", "training.json"))
    with pytest.raises(ValueError, match=f"whose weights were not quantised; this backbone's are quantised by {name}: load it without quantization_config"):
        EPTModel.from_pretrained(small.model, other.adapter_dir)


def test_a_prompt_in_use_quantises_its_backbone_as_in_training(folder, library, data, tmp_path):
    backbone = load_backbone(folder, device="cpu", precision="bfloat16", quantization_config=library[1]())
    run = train(TASK, "ept", 0, backbone, data, tmp_path / "adapter", training=replace(CONFIG, steps=2), sizes=SIZES, progress=False)
    clf = Classifier.from_pretrained(run.adapter_dir)
    assert fingerprint(clf.backbone.model, exact=True) == fingerprint(backbone.model, exact=True) and clf.backbone.model.dtype == torch.bfloat16
    expected = Classifier.from_pretrained(run.adapter_dir, backbone)(["red 1", "blue 2"])
    assert clf(["red 1", "blue 2"]).probabilities.tolist() == expected.probabilities.tolist()


def test_other_bits_are_other_weights(folder, data, tmp_path):
    eight, four = (load_backbone(folder, device="cpu", quantization_config={"quant_method": "rounding", "bits": bits}) for bits in (8, 4))
    build_method("pt", eight.model, **SIZES).save_pretrained(tmp_path)
    assert read_record(tmp_path).backbone.quantization == {"quant_method": "rounding", "bits": 8}
    with pytest.raises(ValueError, match="in float32, quantised as {.*'bits': 8.*}, with other weights than this backbone has"):
        EPTModel.from_pretrained(four.model, tmp_path)


def test_every_number_of_quantised_weights_is_in_the_fingerprint(folder):
    model = load_backbone(folder, device="cpu", quantization_config=Rounding()).model
    known = {fingerprint(model)}
    for part in ("weight", "scale"):
        tensor = next(t for name, t in stored_tensors(model).items() if name.endswith((f".q.{part}", f".q_proj.{part}")))
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        known.add(fingerprint(model))
    assert len(known) == 3
    model.inner = nn.Module()
    model.inner.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged), requires_grad=False)
    parts = [name for name in stored_tensors(model) if name.startswith("inner")]
    assert {"inner.weight._values", "inner.weight._offsets"} <= set(parts), "a tensor that consists of tensors, as those of torchao do"


@needs_torchao
def test_a_model_that_was_quantised_before_says_so_itself(folder, tmp_path):
    backbone = load_backbone(folder, device="cpu", quantization_config=by_torchao())
    backbone.model.save_pretrained(tmp_path / "small")
    backbone.tokenizer.save_pretrained(tmp_path / "small")
    build_method("pt", backbone.model, **SIZES).save_pretrained(tmp_path / "adapter")
    recorded = read_record(tmp_path / "adapter").backbone.quantization
    for given in (None, recorded):
        again = load_backbone(tmp_path / "small", device="cpu", quantization_config=given)
        assert fingerprint(again.model, exact=True) == fingerprint(backbone.model, exact=True)
        EPTModel.from_pretrained(again.model, tmp_path / "adapter")


def test_quantised_weights_are_not_trained(folder, library, data, tmp_path):
    backbone = load_backbone(folder, device="cpu", quantization_config=library[1]())
    with pytest.raises(ValueError, match=f"trains every weight, and those of the backbone are quantised by {library[0]}; load it without quantization_config, or choose"):
        train(TASK, "finetune", 0, backbone, data, tmp_path / "a", training=replace(CONFIG, steps=2), progress=False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_quantise_is_named(folder, monkeypatch):
    """And not taken for a hub that cannot be reached, or a folder that is damaged."""
    with pytest.raises(ValueError, match="quantization_config of backbone .* cannot be used: Unknown quantization type, got roundign"):
        load_backbone(folder, quantization_config={"quant_method": "roundign"})
    missing = "transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer.validate_environment"
    for error, kind, message in (
        (ImportError("pip install bitsandbytes"), ImportError, "pip install bitsandbytes"),
        (RuntimeError("No GPU found"), ValueError, "cannot be read with quantised weights .RuntimeError: No GPU found.; see whether its library serves this device and model"),
    ):
        monkeypatch.setattr(missing, lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match=message):
            load_backbone(folder, device="cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
