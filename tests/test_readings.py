"""Other readings of EPT's abstract: what each promises, one at a time and several at once."""

import itertools
import json
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

from ept.methods.registry import METHODS, build_method
from ept.model.modeling import EPTModel
from ept.model.saving import FIRST_READING
from ept.prompt.soft import CHOICES, EPTConfig, SoftPrompt
from tests.conftest import WIDTH, as_written_by, perturbed, tiny_llama, tiny_t5

SIZES = dict(prompt_length=40, short_length=6, max_length=12, spaces=3, space_width=1, fusion_width=2, seed=3)
IDS, MASK = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
LABELS = torch.tensor([[5, 1], [7, 1]])
READINGS = ("fusion_values", "bottleneck", "nonlinearity", "projection_of", "gate_reads", "pair_start", "relative")
ALL = [dict(zip(READINGS, values)) for values in itertools.product(*(CHOICES.get(name, (False, True)) for name in READINGS))]


def trained(model, steps=4, rate=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    return model.adapter_tensors()


# ---- the first reading stays what it was ----------------------------------------------------------------------------------


def test_the_first_reading_is_a_method_and_the_others_began_from_it():
    assert METHODS["ept"].resolve({})[0] == EPTConfig() != EPTConfig(**FIRST_READING)
    assert METHODS["ept-unmasked"].resolve({})[0] == EPTConfig(**FIRST_READING)
    for name in ("ept-values", "ept-nonlinear", "ept-serial", "ept-shared", "ept-svd", "ept-relative", "ept-text-gate"):
        config = METHODS[name].resolve({})[0]
        assert config.fusion_reads == "all" and config != EPTConfig(**FIRST_READING), name
    for name in ("ept-no-fusion", "ept-no-projection", "ept-one-space"):
        assert METHODS[name].resolve({})[0].fusion_reads == "trained", f"{name} is EPT without one thing, not the first reading"


def version_one(folder):
    "An adapter as it was written before there were other readings."
    as_written_by(1, folder, tiny_t5())
    return json.loads((folder / "adapter_config.json").read_text())["config"]


@pytest.mark.parametrize("method", ["ept", "dept", "pt", "frozen"])
def test_an_adapter_of_version_1_means_what_it_meant(method, tmp_path):
    model, backbone = perturbed(build_method(method, tiny_t5(), **SIZES)), tiny_t5()
    old = version_one(model.save_pretrained(tmp_path / "adapter"))
    assert list(old) == [f.name for f in fields(EPTConfig)][:13], "what version 1 knew comes first"
    again = EPTModel.from_pretrained(backbone, tmp_path / "adapter")
    assert again.prompt_config == replace(model.prompt_config, **FIRST_READING)
    assert torch.equal(again.score(IDS, MASK, [[3, 1], [4]]), model.score(IDS, MASK, [[3, 1], [4]]))


def test_todays_defaults_have_no_say_in_version_1(tmp_path, monkeypatch):
    model = perturbed(build_method("ept", tiny_t5(), **SIZES))
    version_one(model.save_pretrained(tmp_path / "adapter"))
    given = EPTConfig.__init__.__defaults__
    names = [f.name for f in fields(EPTConfig)]
    others = {"projection_of": "fused", "gate_reads": "prompt"}
    monkeypatch.setattr(EPTConfig.__init__, "__defaults__", tuple(others.get(name, value) for name, value in zip(names, given)))
    assert EPTConfig().projection_of == "fused" and EPTConfig().fusion_reads == "trained"
    again = EPTModel.from_pretrained(tiny_t5(), tmp_path / "adapter")
    assert torch.equal(again.prompt()[0], model.prompt()[0])
    again.prompt.cover(4)
    assert torch.equal(again.prompt()[0], model.prompt()[0]), "its fusion reads all rows, however long the training texts were"


# ---- controls -------------------------------------------------------------------------------------------------------------


def test_ept_with_fixed_modules_is_dept_of_its_rank_to_the_bit():
    fixed, dept, ept = (build_method(name, tiny_t5(), **SIZES) for name in ("ept-fixed", "dept-ept-rank", "ept"))
    assert fixed.num_trainable_parameters() == dept.num_trainable_parameters() < ept.num_trainable_parameters()
    assert fixed.prompt_config.rank == dept.prompt_config.rank == ept.prompt_config.rank
    assert dept.prompt.fusion is dept.prompt.projection is None and fixed.prompt.fusion and fixed.prompt.projection
    assert {name: list(group) for name, group in fixed.parameter_groups().items()} == {name: list(group) for name, group in dept.parameter_groups().items()}
    before = {name: t.clone() for name, t in fixed.adapter_tensors().items()}
    one, other = trained(fixed), trained(dept)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items()) and not torch.equal(one["embeddings"], before["embeddings"])
    assert all(torch.equal(one[name], tensor) for name, tensor in before.items() if name not in other)
    assert torch.equal(fixed(input_ids=IDS, labels=LABELS).logits, dept(input_ids=IDS, labels=LABELS).logits)


def test_fixed_modules_are_at_zero_in_every_reading():
    for choices in ALL:
        config = EPTConfig(**SIZES, modules="fixed", fusion_start=0.3, **choices)
        model = EPTModel(tiny_t5(), config)
        terms = model.prompt.terms(model.prompt.offsets()[1])
        assert not terms.fusion.any() and not terms.projection.any(), choices
        assert {name for name, p in model.prompt.named_parameters() if p.requires_grad} == {"embeddings", "offset.position_factors", "offset.embedding_factors"}


# ---- every combination ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [tiny_t5, tiny_llama])
def test_all_readings_go_together(backbone):
    backbone, batch = backbone(), dict(input_ids=IDS, attention_mask=MASK)
    labels = LABELS if backbone.config.is_encoder_decoder else IDS.masked_fill(torch.arange(4) < 2, -100)
    for choices in ALL:
        config = EPTConfig(**SIZES, fusion_start=0.1, **choices)
        model = perturbed(EPTModel(backbone, config))
        assert model.num_trainable_parameters() == config.num_parameters(WIDTH) <= SIZES["prompt_length"] * WIDTH, choices
        model(**batch, labels=labels).loss.backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.prompt.parameters()), choices
        assert set(model.prompt.inside()) == {"strength", "fusion", "projection", "offset"} | ({"gate_entropy"} if choices["gate_reads"] != "text" else set())
        if choices["gate_reads"] == "text":
            with pytest.raises(ValueError, match="use the model as it is"):
                model.fold()
        else:
            assert_close(model.fold().score(**batch, candidates=[[3]]), model.score(**batch, candidates=[[3]]), rtol=1e-5, atol=1e-5)


def test_combined_readings_are_saved_whole(tmp_path):
    choices = dict(fusion_reads="all", fusion_values="learned", fusion_start=0.1, projection_of="fused", bottleneck="shared", nonlinearity="gelu", pair_start="svd", relative=True)
    model = perturbed(EPTModel(tiny_t5(), EPTConfig(**SIZES, **choices)))
    model.prompt.cover(5)
    again = EPTModel.from_pretrained(tiny_t5(), model.save_pretrained(tmp_path))
    assert again.prompt_config == model.prompt_config and again.prompt_config.covered_length == 5
    assert torch.equal(again.prompt()[0], model.prompt()[0]) and again.prompt.inside() == model.prompt.inside()


@pytest.mark.parametrize(("name", "given"), [(name, "other") for name in CHOICES])
def test_a_choice_that_is_none_is_refused(name, given):
    with pytest.raises(ValueError, match=name):
        EPTConfig(**{name: given})


# ---- one at a time --------------------------------------------------------------------------------------------------------


def test_masked_fusion_does_not_know_rows_behind_the_training_texts():
    model = perturbed(build_method("ept", tiny_t5(), **SIZES))
    model.prompt.cover(4)
    total = model.prompt()[0]
    total.square().sum().backward()
    gradient = model.prompt.offset.position_factors.grad
    assert gradient[:4].any(dim=1).all() and not gradient[4:].any()
    with torch.no_grad():
        model.prompt.offset.position_factors[4:] *= 9
    assert torch.equal(model.prompt()[0], total)
    everything = perturbed(build_method("ept-unmasked", tiny_t5(), **SIZES))
    everything.prompt.cover(4)
    before = everything.prompt()[0]
    with torch.no_grad():
        everything.prompt.offset.position_factors[4:] *= 9
    assert not torch.equal(everything.prompt()[0], before)


def test_projection_after_fusion_is_of_the_sum():
    for kind in ("gelu", "none"):
        prompt = perturbed(build_method("ept-serial", tiny_t5(), nonlinearity=kind, **SIZES)).prompt
        terms = prompt.terms(prompt.offsets()[1])
        assert_close(terms.projection, prompt.projection(terms.prompt + terms.fusion))
        assert not torch.allclose(terms.projection, prompt.projection(terms.prompt))
        assert_close(prompt.gate_weights(), prompt.projection.gate_weights(terms.prompt + terms.fusion))


def test_a_relative_prompt_starts_where_the_absolute_one_does():
    relative, absolute = (build_method(name, tiny_t5(), **SIZES).prompt for name in ("ept-relative", "ept"))
    assert_close(relative.short_prompt(), absolute.short_prompt())
    assert_close(relative.embeddings.square().mean(), torch.tensor(1.0))


def test_one_rate_is_one_relative_step_on_every_scale_of_embeddings():
    moved = []
    for scale in (0.1, 10):
        config = EPTConfig(**SIZES, relative=True)
        prompt = SoftPrompt(config, scale * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)))
        before, optimizer = prompt.short_prompt().detach().clone(), torch.optim.AdamW(prompt.parameters(), lr=0.1)
        prompt()[0].sum().backward()
        optimizer.step()
        moved.append((prompt.short_prompt() - before).norm() / before.norm())
    assert_close(*moved, rtol=1e-3, atol=0)


def test_a_pair_from_words_moves_the_text_before_the_first_step():
    svd, zero = build_method("ept-svd", tiny_t5(), **SIZES), build_method("ept", tiny_t5(), **SIZES)
    assert torch.equal(svd.prompt.embeddings, zero.prompt.embeddings) and not zero.prompt.offset().any()
    words = torch.linalg.matrix_rank(svd.prompt.offset())
    assert words == min(SIZES["max_length"], svd.prompt_config.rank)
    vocabulary = tiny_t5().shared.weight
    assert 0.01 < svd.prompt.offset().square().mean().sqrt() / vocabulary.square().mean().sqrt() < 0.11


def test_a_gate_on_the_text_makes_another_prompt_for_another_text():
    backbone = tiny_t5()
    model = perturbed(build_method("ept-text-gate", backbone, **SIZES))
    text = backbone.get_input_embeddings()(IDS)
    prompts = model.prompt(text, MASK > 0)[0]
    assert prompts.shape == (2, 6, WIDTH) and not torch.allclose(prompts[0], prompts[1])
    assert_close(model.prompt(text[1:, :3], MASK[1:, :3] > 0)[0][0], prompts[1])
    with pytest.raises(ValueError, match="the gate of this prompt reads the text"):
        model.gate_weights()
    alone = build_method("ept-text-gate", backbone, **SIZES | {"spaces": 1})
    assert not alone.reads_text, "one space leaves nothing to choose"
    alone.fold()


def test_training_tells_how_far_its_texts_reach(tmp_path):
    from datasets import Dataset, DatasetDict

    from ept.data.tasks import Task
    from ept.training.config import TrainingConfig
    from ept.training.training import train
    from tests.conftest import tiny_backbone

    rows = Dataset.from_list([{"text": "ab" * (1 + n % 2), "label": n % 2} for n in range(8)])
    data, backbone = DatasetDict(train=rows, validation=rows, test=rows), tiny_backbone("t5")
    sizes = {name: value for name, value in SIZES.items() if name != "seed"} | {"max_length": 40}
    task, training = Task("short", fields=("text",), labels=("no", "yes")), TrainingConfig(steps=2, batch_size=4, evaluate_every=1)
    run = train(task, "ept", 0, backbone, data, tmp_path / "run", training=training, sizes=sizes | {"prompt_length": 60}, progress=False)
    longest = len(backbone.tokenizer("text: abab").input_ids)
    assert run.config["sizes"]["covered_length"] == longest < 40
    assert EPTModel.from_pretrained(backbone.model, run.adapter_dir).prompt_config.covered_length == longest


# ---- what happens inside --------------------------------------------------------------------------------------------------


def test_inside_tells_how_far_the_modules_have_come():
    model = perturbed(build_method("ept", tiny_t5(), **SIZES))
    inside, terms = model.prompt.inside(), model.prompt.terms(model.prompt.offsets()[1])
    ratio = lambda part: (part.norm() / part.numel() ** 0.5 / (terms.prompt.norm() / terms.prompt.numel() ** 0.5)).item()
    assert inside["strength"] == model.prompt.fusion.strength.item()
    assert inside["fusion"] == pytest.approx(ratio(terms.fusion)) and inside["projection"] == pytest.approx(ratio(terms.projection))
    assert inside["offset"] == pytest.approx(ratio(model.prompt.offset())) and 0 < inside["gate_entropy"] < 1
    model.prompt.cover(3)
    assert model.prompt.inside()["offset"] == pytest.approx(ratio(model.prompt.offset()[:3])), "of the rows that training reaches"
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("dept", {"offset"}),
        ("pt", set()),
        ("frozen", set()),
        ("ept-no-fusion", {"projection", "offset", "gate_entropy"}),
        ("ept-one-space", {"strength", "fusion", "projection", "offset"}),
        ("ept-token", {"strength", "fusion", "projection", "offset", "gate_entropy"}),
        ("respt", set()),
    ],
)
def test_inside_has_keys_for_what_is_there(method, keys):
    model = build_method(method, tiny_t5(), **SIZES)
    assert set(model.prompt.inside()) == keys
    if "gate_entropy" in keys:
        assert model.prompt.inside()["gate_entropy"] == pytest.approx(1)
