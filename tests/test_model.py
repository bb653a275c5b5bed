"""Properties of a prompt on a backbone that are not the same for every method."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ept.model.modeling import EPTModel
from ept.prompt.soft import EPTConfig
from tests.conftest import MODELS, WIDTH, tiny_llama, tiny_t5

SIZES = dict(prompt_length=40, short_length=6, max_length=12, spaces=3, space_width=1, fusion_width=2)
IDS, MASK = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("kind", MODELS)
def test_pt_equals_peft_in_loss_and_gradients(kind):
    peft = pytest.importorskip("peft")
    model, count = MODELS[kind](), 5
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    ours = EPTModel(copy.deepcopy(model), EPTConfig(prompt_length=count, short_length=count, rank=0, fusion=False, projection=False))
    options = dict(task_type=task_type, num_virtual_tokens=count, token_dim=WIDTH, num_attention_heads=4, num_layers=2)
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(**options)).eval()
    embedding = theirs.prompt_encoder["default"].embedding
    with torch.no_grad():
        embedding.weight[:count] = ours.prompt.embeddings
    labels = torch.tensor([[3, 4, 1], [5, 1, -100]]) if task_type == "SEQ_2_SEQ_LM" else IDS.masked_fill(MASK == 0, -100)
    batch = dict(input_ids=IDS, attention_mask=MASK, labels=labels)
    loss, peft_loss = ours(**batch).loss, theirs(**batch).loss
    loss.backward(), peft_loss.backward()
    assert_close(loss, peft_loss, rtol=0, atol=1e-5)
    assert_close(ours.prompt.embeddings.grad, embedding.weight.grad[:count], rtol=0, atol=1e-5)


def test_text_longer_than_the_offset_is_an_error():
    model = EPTModel(tiny_t5(), EPTConfig(**SIZES))
    with pytest.raises(ValueError, match="the input has 13 tokens, the offset covers s = 12"):
        model(input_ids=torch.full((1, 13), 5), labels=torch.tensor([[1]]))


def test_padding_and_answers_may_lie_beyond_the_offset():
    model = EPTModel(tiny_llama(), EPTConfig(**SIZES))
    ids, mask = torch.full((2, 15), 5), torch.ones(2, 15).long()
    mask[1, 8:] = 0
    labels = torch.full((2, 15), -100)
    labels[0, 12:], labels[1, 7] = 5, 5
    assert torch.isfinite(model(input_ids=ids, attention_mask=mask, labels=labels).loss)


def test_only_the_pair_moves_the_text_by_position():
    model = EPTModel(tiny_t5(), EPTConfig(**SIZES))
    plain = model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
    with torch.no_grad():
        model.prompt.offset.embedding_factors.normal_()
        model.prompt.offset.position_factors[4:] = 1e3  # rows behind the batch
        first = model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits
        model.prompt.offset.position_factors[4:] = -1e3
    assert not torch.equal(first, plain)
    assert_close(model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits, first, rtol=0, atol=0)


@pytest.fixture
def saved(tmp_path):
    model = EPTModel(tiny_t5(), EPTConfig(**SIZES))
    return model, model.save_pretrained(tmp_path / "adapter")


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestLoadingRefuses:
    "Bad adapters are refused before any weight changes, with a message that says what to do."

    def refuse(self, folder, message, backbone=None, error=ValueError):
        backbone = backbone or tiny_t5()
        before = copy.deepcopy(backbone.state_dict())
        with pytest.raises(error, match=message):
            EPTModel.from_pretrained(backbone, folder)
        assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())

    def test_another_family(self, saved):
        self.refuse(saved[1], "this backbone is decoder-only of width 32: load the backbone it was trained on", tiny_llama())

    def test_another_width(self, saved):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=320, decoder_start_token_id=0)
        self.refuse(saved[1], "encoder-decoder, width 32.*this backbone is encoder-decoder of width 16", T5ForConditionalGeneration(config))

    def test_other_weights(self, saved):
        other = tiny_t5()
        with torch.no_grad():
            other.shared.weight.add_(0.1)
        self.refuse(saved[1], "other weights than this backbone has", other)

    def test_another_format_version(self, saved):
        change(saved[1], format_version=3)
        self.refuse(saved[1], "format version 3; this version of ept reads format versions 1 and 2: save it again")

    def test_another_type(self, saved):
        change(saved[1], type="prefix")
        self.refuse(saved[1], "an adapter of type 'prefix' cannot be read; known types: adapter, .*, ept, ept-token, finetune, lora")

    def test_a_type_that_does_not_go_with_the_sizes(self, saved):
        change(saved[1], type="lora")
        self.refuse(saved[1], "an adapter of type 'lora' without extra sizes")
        change(saved[1], type="ept", extra={"spaces": 3})
        self.refuse(saved[1], "an adapter of type 'ept' with extra sizes")

    def test_a_truncated_file(self, saved):
        weights = saved[1] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refuse(saved[1], "is truncated or changed")

    def test_a_tampered_file(self, saved):
        weights = saved[1] / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        self.refuse(saved[1], "is truncated or changed")

    def test_missing_tensors(self, saved):
        import hashlib

        weights = saved[1] / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors.pop("embeddings")
        save_file(tensors, weights)
        change(saved[1], sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
        self.refuse(saved[1], "its configuration needs")

    def test_a_damaged_configuration(self, saved):
        (saved[1] / "adapter_config.json").write_text('{"type": "ept"')
        self.refuse(saved[1], "adapter_config.json is damaged")

    def test_an_unknown_parameter(self, saved):
        record = json.loads((saved[1] / "adapter_config.json").read_text())
        change(saved[1], config=record["config"] | {"rnak": 3})
        self.refuse(saved[1], "unknown parameter 'config.rnak'; did you mean 'rank'?")

    def test_a_folder_without_adapter(self, saved, tmp_path):
        shutil.copy(saved[1] / "adapter_config.json", tmp_path)
        self.refuse(tmp_path, "adapter_model.safetensors not found", error=FileNotFoundError)


def test_loading_never_unpickles(saved):
    (saved[1] / "adapter_model.bin").write_bytes(b"\x80\x04not a tensor")
    assert EPTModel.from_pretrained(tiny_t5(), saved[1]).num_trainable_parameters() == saved[0].num_trainable_parameters()
