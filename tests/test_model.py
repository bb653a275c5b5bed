"""Properties of a prompt on a backbone that are not the same for every method."""

import copy
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ept.model.modeling import EPTModel
from ept.model.saving import FIRST_READING
from ept.model.weights import fingerprint
from ept.prompt.soft import EPTConfig
from tests.conftest import MODELS, WIDTH, as_written_by, seal, tiny_llama, tiny_t5

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


def flip(tensor, index=-1, bit=0):
    """One bit of one number of a tensor, in place."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[tensor.dtype]
    with torch.no_grad():
        tensor.view(-1)[index : index + 1 or None].view(whole).bitwise_xor_(1 << bit)


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
        seal(saved[1], format_version=4)
        self.refuse(saved[1], "format version 4; this version of ept reads format versions 1 to 3: save it again")

    def test_another_type(self, saved):
        seal(saved[1], type="prefix")
        self.refuse(saved[1], "an adapter of type 'prefix' cannot be read; known types: adapter, .*, ept, ept-token, finetune, lora")

    def test_a_type_that_does_not_go_with_the_sizes(self, saved):
        seal(saved[1], type="lora")
        self.refuse(saved[1], "an adapter of type 'lora' without extra sizes")
        seal(saved[1], type="ept", extra={"spaces": 3})
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
        self.put(saved[1], **{"fusion.strength": None})
        self.refuse(saved[1], "its configuration needs")

    def put(self, folder, **tensors):
        """Other tensors in the adapter's file, None for one that is missing, with a checksum that fits."""
        weights = folder / "adapter_model.safetensors"
        save_file({name: t for name, t in (load_file(weights) | tensors).items() if t is not None}, weights)
        seal(folder)

    def test_a_damaged_configuration(self, saved):
        (saved[1] / "adapter_config.json").write_text('{"type": "ept"')
        self.refuse(saved[1], "adapter_config.json is damaged")

    def test_an_unknown_parameter(self, saved):
        record = json.loads((saved[1] / "adapter_config.json").read_text())
        seal(saved[1], config=record["config"] | {"rnak": 3})
        self.refuse(saved[1], "unknown parameter 'config.rnak'; did you mean 'rank'?")

    def test_a_folder_without_adapter(self, saved, tmp_path):
        shutil.copy(saved[1] / "adapter_config.json", tmp_path)
        self.refuse(tmp_path, "adapter_model.safetensors not found", error=FileNotFoundError)

    @pytest.mark.parametrize(("name", "value"), [("alpha", 80.0), ("seed", 1), ("fusion_width", 3), ("relative", True)])
    def test_an_edited_configuration(self, saved, name, value):
        path = saved[1] / "adapter_config.json"
        record = json.loads(path.read_text())
        record["config"][name] = value
        path.write_text(json.dumps(record))
        self.refuse(saved[1], "adapter_config.json or adapter_model.safetensors is truncated or changed")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("alpha", float("nan"), "NaN is no number of JSON"),
            ("alpha", 10**400, "config.alpha is .*it must be float"),
            ("alpha", "nan", "alpha is '?nan'?"),
            ("prompt_length", -40, "short_length m = 6 > prompt_length l = -40"),
            ("max_length", -12, "max_length is -12; it must be at least 1"),
            ("spaces", 0, "spaces is 0; it must be at least 1"),
            ("short_length", 2.5, "config.short_length is 2.5 .float.; it must be int"),
            ("short_length", 10**11, "short_length m = 100000000000 > prompt_length l = 40"),
            ("fusion", "no", "config.fusion is 'no' .str.; it must be bool"),
        ],
    )
    @pytest.mark.parametrize("version", [2, 3])
    def test_values_that_no_prompt_has(self, saved, name, value, message, version):
        """Somebody has made the checksum fit, or the format has none over the configuration."""
        if version == 2:
            as_written_by(2, saved[1], tiny_t5())
        record = json.loads((saved[1] / "adapter_config.json").read_text())
        seal(saved[1], config=record["config"] | {name: value})
        self.refuse(saved[1], message)

    def test_sizes_that_no_memory_holds(self, saved):
        as_written_by(2, saved[1], tiny_t5())
        record = json.loads((saved[1] / "adapter_config.json").read_text())
        seal(saved[1], config=record["config"] | {"prompt_length": 10**13, "short_length": 10**12})
        self.refuse(saved[1], "holds 1,237 numbers; its configuration needs 32,000,000,001,045: save the adapter again")

    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_numbers_that_are_none(self, saved, version):
        if version < 3:
            as_written_by(version, saved[1], tiny_t5())
        prompt = load_file(saved[1] / "adapter_model.safetensors")["embeddings"]
        for wrong, message in (
            (prompt.int(), "embeddings is a tensor of int32; allowed are float32, bfloat16, float16"),
            (prompt.double(), "embeddings is a tensor of float64"),
            (prompt.index_fill(0, torch.tensor([1]), float("nan")), "embeddings holds numbers that are not finite"),
            (prompt / 0, "embeddings holds numbers that are not finite"),
            (prompt[0], "holds 1,077 numbers; its configuration needs 1,237"),
            (prompt[:, None], r"holds tensors embeddings .6, 1, 32.; its configuration needs embeddings .6, 32."),
        ):
            self.put(saved[1], embeddings=wrong)
            self.refuse(saved[1], message)

    def test_a_folded_prompt_of_another_shape(self, saved, tmp_path):
        folder = saved[0].fold().save_pretrained(tmp_path / "folded")
        prompt = load_file(folder / "adapter_model.safetensors")["prompt"]
        for wrong in (torch.cat([prompt, prompt]), torch.cat([prompt, prompt], 1), prompt[None]):
            self.put(folder, prompt=wrong)
            self.refuse(folder, r"its configuration needs prompt .6, 32.")
        self.put(folder, prompt=prompt, offset=None)
        self.refuse(folder, "its configuration needs 576")

    @pytest.mark.parametrize("field", ["type", "format_version", "folded", "config", "backbone", "sha256"])
    def test_a_configuration_without_a_field(self, saved, field):
        path = saved[1] / "adapter_config.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in record.items() if name != field}))
        self.refuse(saved[1], f"adapter_config.json is damaged or of another version .{field} is missing; AdapterRecord needs")

    def test_what_is_no_mapping(self, saved):
        for content in ("[]", "7", "null", "[" * 10**5):
            (saved[1] / "adapter_config.json").write_text(content)
            self.refuse(saved[1], "adapter_config.json is damaged")

    def test_an_adapter_of_peft(self, saved):
        (saved[1] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        self.refuse(saved[1], "holds an adapter of PEFT, type 'LORA'; read prompts of PEFT with import_peft")

    def test_what_is_no_model(self, saved):
        for given in ("t5-base", None, saved[1]):
            with pytest.raises(ValueError, match="give a model of transformers, such as load_backbone"):
                EPTModel(given, EPTConfig(**SIZES))
            with pytest.raises(ValueError, match="give a model of transformers, such as load_backbone"):
                EPTModel.from_pretrained(given, saved[1])


def test_what_could_not_be_read_again_is_not_written(saved, tmp_path):
    model = saved[0]
    with torch.no_grad():
        model.prompt.embeddings[0, 0] = float("nan")
    with pytest.raises(ValueError, match="embeddings holds numbers that are not finite"):
        model.save_pretrained(saved[1])
    with pytest.raises(ValueError, match="embeddings holds numbers that are not finite"):
        model.save_pretrained(tmp_path / "new")
    assert EPTModel.from_pretrained(tiny_t5(), saved[1]) and not (tmp_path / "new").exists(), "the earlier adapter is still there, and whole"


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_of_earlier_versions_are_read(saved, version):
    as_written_by(version, saved[1], tiny_t5())
    again = EPTModel.from_pretrained(tiny_t5(), saved[1])
    assert asdict(again.prompt_config) == asdict(saved[0].prompt_config) | (FIRST_READING if version == 1 else {})
    assert all(torch.equal(t, saved[0].adapter_tensors()[name]) for name, t in again.adapter_tensors().items())
    other = tiny_t5()
    flip(other.shared.weight, 0, bit=20)
    with pytest.raises(ValueError, match="other weights than this backbone has"):
        EPTModel.from_pretrained(other, saved[1])


class TestEveryBitOfTheBackbone:
    "An adapter knows all weights of its backbone."

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_seen_in_the_same_precision(self, dtype, tmp_path):
        backbone = tiny_t5().to(dtype)
        folder = EPTModel(backbone, EPTConfig(**SIZES)).save_pretrained(tmp_path)
        assert EPTModel.from_pretrained(tiny_t5().to(dtype), folder)
        for name, weight in backbone.named_parameters():
            flip(weight)
            with pytest.raises(ValueError, match="with other weights than this backbone has"):
                EPTModel.from_pretrained(backbone, folder)
            assert EPTModel.from_pretrained(backbone, folder, other_weights=True), name
            flip(weight)
        assert EPTModel.from_pretrained(backbone, folder), "as it was"

    def test_of_bfloat16_is_seen_in_another_precision(self, saved):
        """Of float32 the lower half is rounded away, which is what loading in bfloat16 does."""
        assert EPTModel.from_pretrained(tiny_t5().bfloat16(), saved[1])
        other = tiny_t5().bfloat16()
        flip(other.lm_head.weight)
        with pytest.raises(ValueError, match="with other weights than this backbone has"):
            EPTModel.from_pretrained(other, saved[1])

    def test_is_hashed_once_until_it_changes(self, monkeypatch):
        from ept.model import weights

        model, count, plain = tiny_t5(), [], weights._hash
        monkeypatch.setattr(weights, "_hash", lambda *given: count.append(1) or plain(*given))
        first = fingerprint(model)
        assert fingerprint(model) == first and len(count) == 1
        flip(model.shared.weight, bit=20)
        assert fingerprint(model) != first and len(count) == 2
        model.shared.weight.data += 1  # the way PEFT merges, which torch does not count
        assert fingerprint(model) != first and len(count) == 3
        model.load_state_dict(tiny_t5().state_dict())
        assert fingerprint(model) == first


def test_no_pickle_is_read(saved):
    (saved[1] / "adapter_model.bin").write_bytes(b"\x80\x04not a tensor")
    assert EPTModel.from_pretrained(tiny_t5(), saved[1]).num_trainable_parameters() == saved[0].num_trainable_parameters()
