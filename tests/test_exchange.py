"""Adapters of others: DePT's released files where they are at hand, files of the same form otherwise, and PEFT both ways."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ept.methods.catalogue import SHARED
from ept.methods.registry import build_method
from ept.methods.sources import SOURCE_TASKS
from ept.model.exchange import export_peft, import_dept, import_peft
from ept.model.modeling import EPTModel
from tests.conftest import MODELS, WIDTH, tiny_llama, tiny_t5

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(os.environ.get("EPT_TEST_PEERS", ROOT.parent / "shared" / "peers"))
SIZES = dict(prompt_length=10, short_length=4, max_length=12)
IDS, MASK = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def released_form(folder, length=6, rank=3, covered=12, width=WIDTH, **changes):
    """A file of the form in which DePT's adapters are published, with random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(4)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    tensors = {"prompt_embeddings": random(length, width), "prompt_encoder.lora_embedding_A": random(covered, rank)}
    tensors["prompt_encoder.lora_embedding_B"] = random(rank, width)
    torch.save(tensors, folder / "adapter_model.bin")
    record = {
        "peft_type": "PROMPT_TUNING_LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": "t5-base",
        "r": rank,
        "num_virtual_tokens": length,
        "max_length": covered,
        "lora_alpha": 8,
        "token_dim": width,
    }
    (folder / "adapter_config.json").write_text(json.dumps(record | changes))
    return tensors


def by_hand(tensors, model, ids):
    """Logits of a T5 with DePT's formula written out."""
    prompt, a, b = tensors.values()
    text = model.get_input_embeddings()(ids) + 8 / a.shape[1] ** 0.5 * (a @ b)[: ids.shape[1]]
    embeddings = torch.cat([prompt.expand(len(ids), -1, -1), text], dim=1)
    return model(inputs_embeds=embeddings, labels=torch.tensor([[3, 1]] * len(ids))).logits


class TestDePT:
    def test_an_adapter_is_the_formula(self, tmp_path):
        tensors, backbone = released_form(tmp_path), tiny_t5()
        model = import_dept(backbone, tmp_path)
        assert_close(model(input_ids=IDS[:1], labels=torch.tensor([[3, 1]])).logits, by_hand(tensors, backbone, IDS[:1]), rtol=1e-5, atol=1e-5)
        assert (model.prompt_config.rank, model.prompt_config.short_length, model.prompt_config.max_length) == (3, 6, 12)
        assert model.num_trainable_parameters() == sum(t.numel() for t in tensors.values())

    def test_it_is_a_model_like_any_other(self, tmp_path):
        released_form(tmp_path / "released")
        backbone = tiny_t5()
        model = import_dept(backbone, tmp_path / "released")
        again = EPTModel.from_pretrained(backbone, model.save_pretrained(tmp_path / "ours"))
        score = lambda m: m.score(input_ids=IDS, attention_mask=MASK, candidates=[[5, 1], [7]])
        assert torch.equal(score(again), score(model))
        assert_close(score(model.fold()), score(model), rtol=1e-5, atol=1e-5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert model.prompt.offset.embedding_factors.grad.any()

    @pytest.mark.parametrize("task, length, rank", [("cola", 80, 15), ("sst2", 60, 30)])
    def test_the_released_adapters(self, task, length, rank):
        if not (PEERS / "dept" / task).is_dir():
            pytest.skip(f"DePT's released adapters are not at hand ({PEERS / 'dept' / task}); set EPT_TEST_PEERS to a folder with dept/{task}")
        config = T5Config(d_model=768, d_kv=64, d_ff=64, num_layers=1, num_heads=12, vocab_size=128, decoder_start_token_id=0)
        backbone = T5ForConditionalGeneration(config).eval()
        model = import_dept(backbone, PEERS / "dept" / task)
        assert (model.prompt_config.short_length, model.prompt_config.rank, model.prompt_config.prompt_length) == (length, rank, 100)
        assert model.num_trainable_parameters() == 76_800
        tensors = torch.load(PEERS / "dept" / task / "adapter_model.bin", weights_only=True, map_location="cpu")
        tensors = {name: tensors[name] for name in ("prompt_embeddings", "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")}
        labels = torch.tensor([[3, 1]] * 2)
        assert_close(model(input_ids=IDS, labels=labels).logits, by_hand(tensors, backbone, IDS), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="PROMPT_TUNING_LORA|SEQ_2_SEQ_LM, width 768"):
            import_dept(tiny_t5(), PEERS / "dept" / task)

    def test_another_backbone_is_refused(self, tmp_path):
        released_form(tmp_path)
        with pytest.raises(ValueError, match="trained on t5-base .SEQ_2_SEQ_LM, width 32.; this backbone is decoder-only of width 32"):
            import_dept(tiny_llama(), tmp_path)
        released_form(tmp_path, width=16)
        with pytest.raises(ValueError, match="this backbone is encoder-decoder of width 32: load the backbone it was trained on"):
            import_dept(tiny_t5(), tmp_path)

    def test_other_files_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not an adapter: adapter_config.json and adapter_model.safetensors"):
            import_dept(tiny_t5(), tmp_path)
        released_form(tmp_path, peft_type="LORA")
        with pytest.raises(ValueError, match="an adapter of type 'LORA'; this function reads PROMPT_TUNING_LORA"):
            import_dept(tiny_t5(), tmp_path)
        tensors = released_form(tmp_path)
        tensors.pop("prompt_encoder.lora_embedding_B")
        torch.save(tensors, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match="needed are prompt_embeddings, prompt_encoder.lora_embedding_A"):
            import_dept(tiny_t5(), tmp_path)
        (tmp_path / "adapter_model.bin").write_bytes(b"half of a file")
        with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
            import_dept(tiny_t5(), tmp_path)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("prompt_embeddings", lambda t: t.index_fill(0, torch.tensor([2]), float("nan")), "prompt_embeddings holds numbers that are not finite"),
            ("prompt_embeddings", lambda t: t.int(), "prompt_embeddings is a tensor of int32; allowed are float32"),
            ("prompt_embeddings", lambda t: t[0], r"holds prompt_embeddings .32.; each tensor must have two dimensions"),
            ("prompt_embeddings", lambda t: t[None], r"holds prompt_embeddings .1, 6, 32.; each tensor must have two dimensions"),
            ("prompt_embeddings", lambda t: t[:0], r"holds prompt_embeddings .0, 32.; each tensor must have two dimensions, neither of them 0"),
            ("prompt_encoder.lora_embedding_A", lambda t: t / 0, "lora_embedding_A holds numbers that are not finite"),
            ("prompt_encoder.lora_embedding_B", lambda t: t.sum(), r"holds prompt_encoder.lora_embedding_B ..; each tensor must have"),
            ("prompt_encoder.lora_embedding_B", lambda t: t[:2], r"holds a pair of shapes .12, 3. and .2, 32."),
        ],
    )
    def test_numbers_that_are_none_are_refused(self, tmp_path, name, change, message):
        tensors = released_form(tmp_path)
        torch.save(tensors | {name: change(tensors[name])}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=message):
            import_dept(tiny_t5(), tmp_path)

    @pytest.mark.parametrize("wrong", [{"lora_alpha": float("nan")}, {"lora_alpha": [8]}, {"num_virtual_tokens": "six"}, {"peft_type": None}, {"task_type": 3}])
    def test_a_configuration_of_wrong_values_is_refused(self, tmp_path, wrong):
        released_form(tmp_path, **wrong)
        with pytest.raises(ValueError, match=f"{next(iter(wrong)).removeprefix('lora_')} is "):
            import_dept(tiny_t5(), tmp_path)

    def test_code_in_a_file_never_runs(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return (tmp_path / "ran").touch, ()

        released_form(tmp_path)
        torch.save({"prompt_embeddings": Harmful()}, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match="holds more than tensors, which is never loaded"):
            import_dept(tiny_t5(), tmp_path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", MODELS)
class TestPEFT:
    def logits(self, model, backbone, skip=0):
        labels = {"labels": torch.tensor([[3, 1], [5, 1]])} if backbone.config.is_encoder_decoder else {}
        found = model(input_ids=IDS, attention_mask=MASK, **labels).logits
        return found if labels else found[:, skip:][MASK == 1]

    @pytest.mark.parametrize("method", ["pt", "spot", "mpt", "respt"])
    def test_a_folded_prompt_gives_the_same_logits_there(self, kind, method, tmp_path):
        peft = pytest.importorskip("peft")
        backbone = MODELS[kind]()
        sources = {task: torch.randn(10, WIDTH) for task in (*SOURCE_TASKS, SHARED)}
        model = build_method(method, backbone, source_prompts=sources, residual_width=5, **SIZES)
        for exported in (model, model.fold()):
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), export_peft(exported, tmp_path / "peft")).eval()
            assert_close(self.logits(theirs, backbone, skip=10), self.logits(model, backbone), rtol=1e-5, atol=1e-5)
        assert_close(self.logits(import_peft(backbone, tmp_path / "peft"), backbone), self.logits(model, backbone), rtol=1e-6, atol=1e-6)

    def test_an_adapter_that_peft_wrote_gives_the_same_logits_here(self, kind, tmp_path):
        peft = pytest.importorskip("peft")
        backbone = MODELS[kind]()
        options = dict(task_type="SEQ_2_SEQ_LM" if backbone.config.is_encoder_decoder else "CAUSAL_LM", num_virtual_tokens=5)
        theirs = peft.get_peft_model(copy.deepcopy(backbone), peft.PromptTuningConfig(num_transformer_submodules=1, **options)).eval()
        theirs.save_pretrained(tmp_path)
        assert_close(self.logits(import_peft(backbone, tmp_path), backbone), self.logits(theirs, backbone, skip=5), rtol=1e-5, atol=1e-5)

    def test_what_peft_cannot_hold_is_not_exported(self, kind, tmp_path):
        backbone = MODELS[kind]()
        sources = {task: torch.randn(10, WIDTH) for task in (*SOURCE_TASKS, SHARED)}
        build = lambda method: build_method(method, backbone, source_prompts=sources, **SIZES)
        for method, message in {
            "dept": "cannot hold this prompt: it has an offset by position",
            "frozen": "cannot hold this prompt: it has no tokens",
            "attempt": "this prompt depends on the text",
            "lora": "trains parameters inside the backbone",
        }.items():
            with pytest.raises(ValueError, match=message):
                export_peft(build(method), tmp_path / "peft")
        assert not (tmp_path / "peft").exists()


def test_a_prompt_of_the_decoder_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=2)
    peft.get_peft_model(tiny_t5(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="10 rows for 5 prompt tokens; prompts of the decoder are not supported"):
        import_peft(tiny_t5(), tmp_path)


def test_an_exported_prompt_names_its_backbone_as_the_hub_does(tmp_path):
    backbone = tiny_llama()
    for name, known in (("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("t5-base", "google-t5/t5-base"), ("org/model", "org/model"), ("../mine", "../mine")):
        backbone.config._name_or_path = name
        export_peft(build_method("pt", backbone, **SIZES), tmp_path / "peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == known
