"""The comparison methods: counts against the literature, source prompts, what may be combined with what."""

import copy
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ept.methods.adapter import adapter_places
from ept.methods.catalogue import SHARED
from ept.methods.registry import METHODS, build_method, method_table, num_parameters, size_names, source_runs
from ept.methods.sources import SOURCE_TASKS, SharedPrompt, read_sources, sources_of
from ept.model.modeling import EPTModel
from ept.model.saving import FIRST_READING, sizes_of
from ept.prompt.base import KINDS
from tests.conftest import WIDTH, as_written_by, tiny_llama, tiny_t5

SIZES = dict(prompt_length=20, short_length=4, max_length=12, spaces=2, space_width=1, fusion_width=1)


@pytest.fixture(scope="module")
def t5_base():
    """T5-base's shape, without numbers."""
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128, decoder_start_token_id=0)
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def prompts(length=20, width=WIDTH, tasks=(*SOURCE_TASKS, SHARED)):
    """Prompts to start from, of source tasks and the one that they share."""
    generator = torch.Generator().manual_seed(2)
    return {task: torch.randn(length, width, generator=generator) for task in tasks}


# ---- counts -------------------------------------------------------------------------------------------------------------

# T5-base: 12 attentions in the encoder, 24 in the decoder; 24 feed-forwards; 2 norms a layer and one at the end of the
# encoder, 3 and one of the decoder.
ATTENTIONS, NORMS, ADAPTER = 36, (12 * 2 + 1) + (12 * 3 + 1), 2 * 768 * 24 + 24 + 768
BIASES = ATTENTIONS * 4 * 768 + 24 * (3072 + 768) + NORMS * 768 + 32128
COUNTS = {  # method: (formula, what the literature prints)
    "finetune": (222_903_552, 220e6),
    "adapter": (48 * ADAPTER + NORMS * 768, 1.9e6),
    "adapterdrop": (28 * ADAPTER + NORMS * 768, 1.1e6),
    "bitfit": (BIASES, 280e3),
    "lora": (ATTENTIONS * 2 * 32 * (768 + 768), None),
    "pt": (76_800, 76.8e3),
    "spot": (76_800, 76.8e3),
    "dept": (76_800, 76.8e3),
    "attempt": (76_800 + 2 * 768 * 100 + 2 * 768, 232e3),
    "mpt": (76_800 + 100 + 768, 77.6e3),
    "respt": (76_800 + 2 * 768 * 800 + 800 + 3 * 768, None),
    "ept": (30_720 + (256 + 768) * 24 + (2 * 768 * 4 + 1) + (2 * 4 * 768 * 2 + 768 * 3), None),
    "frozen": (0, None),
}


@pytest.fixture(scope="module")
def table(t5_base):
    return method_table(t5_base)


@pytest.mark.parametrize("method", COUNTS)
def test_parameters_on_t5_base_are_those_of_the_literature(method, table):
    formula, printed = COUNTS[method]
    assert table.parameters[method] == formula
    if printed:  # two digits are printed of fine-tuning and adapters, three of prompts, the last one cut off for mpt
        assert abs(formula - printed) / printed < 0.03


def test_the_literatures_lora_is_ours_and_the_biases(table):
    assert round((table.parameters["lora"] + table.parameters["bitfit"]) / 1e6, 1) == 3.8
    assert round(100 * (table.parameters["lora"] + BIASES) / 222_903_552, 2) == 1.71


def test_the_table_has_every_method_and_its_source(table):
    assert set(table.index) == set(METHODS) and table.index[0] == "ept"
    undated = [name for name, source in table.source.items() if source != "-" and not re.search(r"\d{4}", source)]
    assert not undated, "`source` names a paper with its year, or is '-' for what has none"
    assert not [name for name, text in table.implementation.items() if not text], "`about` says where the code comes from, and what differs"


# ---- sources ------------------------------------------------------------------------------------------------------------


def test_a_task_is_never_its_own_source():
    for task in SOURCE_TASKS:
        for method in METHODS:
            assert task not in [source for source, _ in source_runs(task, method)]
    assert source_runs("cb", "attempt") == tuple((task, "pt") for task in SOURCE_TASKS)
    assert source_runs("cb", "spot") == (("mnli", "pt"),) and source_runs("mnli", "spot") == (("qnli", "pt"),)
    assert source_runs("cb", "mpt") == source_runs("mnli", "mpt") == ((SHARED, "mpt"),)
    assert sources_of("sst2") == ("mnli", "qnli", "qqp", "boolq", "multirc")
    assert source_runs("sst2", "attempt") == tuple((task, "pt") for task in sources_of("sst2"))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].sources])
def test_missing_sources_say_how_to_train_them(method):
    made = ", make one of their prompts with share_prompt" if METHODS[method].shared else ""
    message = rf"train method 'pt' on source tasks \(mnli, qnli, qqp, sst2, boolq, multirc\){made}, then pass source_prompts"
    wrong = {"mnli": torch.zeros(20, WIDTH)} if METHODS[method].shared else {SHARED: torch.zeros(20, WIDTH)}
    for given in (None, wrong):
        with pytest.raises(ValueError, match=message):
            build_method(method, tiny_t5(), source_prompts=given, **SIZES)


def test_a_source_must_fit(tmp_path):
    with pytest.raises(ValueError, match=r"the source prompt of mnli has shape \[7, 32\]; it must be \[m, d\] = \[20, 32\]"):
        build_method("spot", tiny_t5(), source_prompts=prompts(7), **SIZES)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        build_method("spot", tiny_t5(), source_prompts={"mnli": torch.full((20, WIDTH), float("nan"))}, **SIZES)
    with pytest.raises(FileNotFoundError, match="train method 'pt' on task 'mnli' first"):
        build_method("spot", tiny_t5(), source_prompts={"mnli": tmp_path / "missing"}, **SIZES)
    with pytest.raises(FileNotFoundError, match="make it with share_prompt first"):
        build_method("mpt", tiny_t5(), source_prompts={SHARED: tmp_path / "missing"}, **SIZES)
    build_method("lora", tiny_t5(), **SIZES).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="give a run of method 'pt'"):
        read_sources({"mnli": tmp_path / "lora"}, tiny_t5(), 20)
    build_method("pt", tiny_t5(), **SIZES).save_pretrained(tmp_path / "pt")
    with pytest.raises(ValueError, match="give what share_prompt has made"):
        read_sources({SHARED: tmp_path / "pt"}, tiny_t5(), 20)
    with pytest.raises(ValueError, match="this backbone is decoder-only"):
        read_sources({"mnli": tmp_path / "pt"}, tiny_llama(), 20)


def test_spot_starts_from_its_first_source():
    given = prompts()
    model = build_method("spot", tiny_t5(), source_prompts=given, **SIZES)
    assert torch.equal(model.prompt.embeddings, given["mnli"])
    given["mnli"].zero_()
    assert model.prompt.embeddings.any(), "a start is a copy"


def test_mpt_starts_from_what_its_sources_share(tmp_path):
    plain = build_method("mpt", tiny_t5(), source_prompts=prompts(), **SIZES)
    assert torch.equal(plain.prompt()[0], prompts()[SHARED]), "a prompt alone has ones beside it"
    shared = SharedPrompt(torch.randn(20, WIDTH), torch.rand(20), torch.rand(WIDTH))
    model = build_method("mpt", tiny_t5(), source_prompts={SHARED: shared}, **SIZES)
    assert_close(model.prompt()[0], shared.prompt * shared.rows[:, None] * shared.columns)
    again = build_method("mpt", tiny_t5(), source_prompts={SHARED: model.save_pretrained(tmp_path)}, **SIZES)
    assert all(torch.equal(found, given) for found, given in zip(again.prompt.shared(), shared)), "not the product alone, but its factors"


def test_attempt_keeps_its_sources_in_the_adapter(tmp_path):
    given, backbone = prompts(), tiny_t5()
    model = build_method("attempt", backbone, source_prompts=given, attention_width=5, **SIZES)
    again = EPTModel.from_pretrained(backbone, model.save_pretrained(tmp_path / "a"))
    assert torch.equal(again.prompt.sources, torch.stack([given[task] for task in SOURCE_TASKS]))
    assert not again.prompt.sources.requires_grad
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    weights = again.prompt.weights(backbone.get_input_embeddings()(ids), torch.ones_like(ids).bool())
    assert weights.shape == (2, len(SOURCE_TASKS) + 1) and not torch.equal(weights[0], weights[1]), "the mixture depends on the text"
    assert_close(weights.sum(-1), torch.ones(2))


# ---- adaptations --------------------------------------------------------------------------------------------------------


def test_adapterdrop_leaves_the_lower_layers_as_they_are():
    config = T5Config(d_model=WIDTH, d_kv=8, d_ff=64, num_layers=5, num_decoder_layers=5, num_heads=4, vocab_size=320, decoder_start_token_id=0)
    backbone = T5ForConditionalGeneration(config).eval()
    model = build_method("adapterdrop", backbone, **SIZES)
    assert model.adaptation.dropped_layers == 2, "5 of 12 layers, rounded down"
    places = adapter_places(backbone)
    having = {name.removeprefix("backbone.").rsplit(".adapter.", 1)[0] for name in model.adapter_tensors() if ".adapter." in name}
    assert having == {name for name, layer in places.items() if layer >= 2}
    assert build_method("adapterdrop", backbone, dropped_layers=4, **SIZES).adaptation.dropped_layers == 4
    assert build_method("adapter", backbone, dropped_layers=4, **SIZES).adaptation.dropped_layers == 0


def test_bitfit_of_gpt2_is_training_its_biases():
    from tests.conftest import tiny_gpt2

    backbone, ids = tiny_gpt2(), torch.tensor([[5, 6, 7, 8]])
    model = build_method("bitfit", backbone, **SIZES)
    with torch.no_grad():
        model.backbone.transformer.h[0].mlp.c_fc.trained_bias.shift.fill_(0.3)
    by_hand = copy.deepcopy(backbone)
    with torch.no_grad():
        by_hand.transformer.h[0].mlp.c_fc.bias.add_(0.3)
    assert_close(model(input_ids=ids).logits, by_hand(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_lora_is_pefts():
    peft = pytest.importorskip("peft")
    backbone, batch = tiny_t5(), dict(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[3, 1]]))
    model = build_method("lora", backbone, lora_rank=4, **SIZES)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.1)
    theirs = peft.get_peft_model(copy.deepcopy(backbone), peft.LoraConfig(r=4, lora_alpha=4, task_type="SEQ_2_SEQ_LM")).eval()
    renamed = {name.replace("backbone.", "base_model.model.", 1): tensor for name, tensor in model.adapter_tensors().items()}
    missing = theirs.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys
    assert_close(model(**batch).loss, theirs(**batch).loss, rtol=1e-6, atol=1e-6)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="no place for adapters is known in OPTForCausalLM; known are the families t5, llama, gpt2"):
        build_method("adapter", model, **SIZES)


def test_ranks_and_widths_grow_with_the_backbone(tmp_path):
    """The literature's on T5-base, in proportion on any other, and what was asked for where it was."""
    from ept.methods.lora import LowRankUpdate
    from ept.methods.respt import ResidualConfig

    def rank(width):
        with torch.device("meta"):
            backbone = T5ForConditionalGeneration(T5Config(d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=8))
        return LowRankUpdate().resolve(backbone).lora_rank

    assert [rank(width) for width in (8, 128, 576, 768)] == [1, 5, 24, 32]
    assert [ResidualConfig().resolve(width).residual_width for width in (128, 576, 768)] == [133, 600, 800]
    for method, given in (("lora", {"lora_rank": 3}), ("respt", {"residual_width": 7})):
        for sizes in ({}, given):
            model = build_method(method, tiny_t5(), **SIZES | sizes)
            assert model.num_trainable_parameters() == num_parameters(method, tiny_t5(), **SIZES | sizes)
            again = EPTModel.from_pretrained(tiny_t5(), model.save_pretrained(tmp_path / method))
            assert again.extra == model.extra and all(getattr(model.extra, name) == value for name, value in given.items() if sizes)


# ---- names and files ----------------------------------------------------------------------------------------------------


def test_sizes_of_other_methods_are_known_but_not_used():
    assert {"lora_rank", "adapter_width", "residual_width", "attention_width", "short_length"} <= set(size_names())
    assert build_method("pt", tiny_t5(), lora_rank=3, **SIZES).extra is None
    with pytest.raises(ValueError, match="unknown parameter 'sizes.lora_rnak'; did you mean 'lora_rank'?"):
        build_method("pt", tiny_t5(), lora_rnak=3, **SIZES)


@pytest.mark.parametrize(
    "method, sizes, message",
    [
        ("lora", {"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ("adapter", {"adapter_width": 0}, "adapter_width is 0; it must be at least 1, or None"),
        ("adapterdrop", {"dropped_layers": 2}, "dropped_layers is 2; the backbone has 2 layers: allowed are 0 to 1"),
        ("respt", {"residual_width": -1}, "residual_width is -1; it must be at least 1"),
        ("lora", {"lora_rank": "many"}, "sizes.lora_rank is 'many'"),
    ],
)
def test_impossible_sizes_are_refused(method, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_method(method, tiny_t5(), **SIZES | sizes)


def test_every_kind_of_file_is_read_as_what_it_is(tmp_path):
    import json

    kinds = set()
    for name in METHODS:
        folder = build_method(name, tiny_t5(), source_prompts=prompts(), **SIZES).save_pretrained(tmp_path / name)
        record = json.loads((folder / "adapter_config.json").read_text())
        kinds.add(record["type"])
        assert record["type"] == METHODS[name].kind.kind and ("extra" in record) == (sizes_of(METHODS[name].kind) is not None)
        again = EPTModel.from_pretrained(tiny_t5(), folder)
        assert isinstance(again.adaptation or again.prompt, KINDS[record["type"]])
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    ("former", "method"), [("residual", "respt"), ("mixture", "attempt"), ("product", "mpt"), ("weights", "finetune"), ("biases", "bitfit"), ("adapters", "adapterdrop")]
)
def test_adapters_keep_their_meaning_under_former_names(former, method, tmp_path):
    import json

    model = build_method(method, tiny_t5(), source_prompts=prompts(), **SIZES)
    file = model.save_pretrained(tmp_path) / "adapter_config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"type": former, "extra": record.get("extra", {})}))
    as_written_by(2, tmp_path, tiny_t5())
    again = EPTModel.from_pretrained(tiny_t5(), tmp_path)
    assert all(torch.equal(tensor, again.adapter_tensors()[name]) for name, tensor in model.adapter_tensors().items())


def test_a_method_of_ones_own_is_known_once_it_is_registered():
    """From any module: no list is edited, no file of the package touched."""
    from torch import nn

    from ept.methods.registry import Method, register
    from ept.prompt.base import Prompt

    class Scaled(Prompt):
        kind = "scaled"

        def __init__(self, config, start, extra=None, sources=None):
            super().__init__(config)
            self.register_buffer("start", start)
            self.scale = nn.Parameter(torch.ones(()))

        @classmethod
        def num_parameters(cls, config, extra, width):
            return 1

        def forward(self):
            return self.scale * self.start, None

    register(Method("scaled", "one factor", "-", Scaled))
    try:
        assert "scaled" in METHODS and build_method("scaled", tiny_t5(), **SIZES).num_trainable_parameters() == num_parameters("scaled", tiny_t5()) == 1
    finally:
        del METHODS._known["scaled"], KINDS["scaled"]
    assert "scaled" not in METHODS


# Sums of absolute values, made with the version before the comparison methods existed.
START = {
    "ept": {
        "embeddings": 102.65078,
        "offset.position_factors": 16.25948,
        "offset.embedding_factors": 0.0,
        "fusion.query": 4.45951,
        "fusion.key": 3.99223,
        "fusion.strength": 0.0,
        "projection.down": 8.3461,
        "projection.up": 0.0,
        "projection.gate": 0.0,
    },
    "dept": {"embeddings": 102.65078, "offset.position_factors": 20.59167, "offset.embedding_factors": 0.0},
    "pt": {"embeddings": 519.06834},
    "frozen": {"embeddings": 0.0},
}
CONFIG_FIELDS = [  # of format version 1
    "prompt_length",
    "short_length",
    "max_length",
    "rank",
    "alpha",
    "fusion",
    "fusion_width",
    "projection",
    "spaces",
    "space_width",
    "initialisation",
    "initial_text",
    "seed",
]


def test_the_family_of_ept_starts_and_is_saved_as_ever(tmp_path):
    """What was saved before the comparison methods existed can be read, and committed results can be made again."""
    import json

    for name in ("ept", "dept", "pt", "frozen"):
        model = build_method(name, tiny_t5(), seed=3, **SIZES)
        record = json.loads((model.save_pretrained(tmp_path / name) / "adapter_config.json").read_text())
        assert list(record) == ["type", "format_version", "folded", "config", "backbone", "sha256"]
        assert record["type"] == "ept" and record["format_version"] == 3 and list(record["config"]) == [*CONFIG_FIELDS, *FIRST_READING]
        assert list(model.prompt.state_dict()) == list(START[name])
        for tensor, total in START[name].items():
            assert_close(model.prompt.state_dict()[tensor].double().abs().sum().item(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method, part", [("lora", "layers"), ("mpt", "module")])
def test_without_peft_the_message_says_what_to_install(method, part, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=rf"method '{method}' takes its {part} from PEFT.*pip install 'ept-prompt-tuning\[peft\]'"):
        build_method(method, tiny_t5(), source_prompts=prompts(), **SIZES)
