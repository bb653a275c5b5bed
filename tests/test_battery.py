"""One battery over every method and every backbone: adding a method means adding nothing here."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ept.methods import METHODS, build_method
from ept.model import EPTModel
from ept.prompt import EPTConfig

SIZES = dict(prompt_length=40, short_length=6, max_length=12, spaces=3, space_width=1, fusion_width=2, seed=3)
CANDIDATES = [[5, 1], [7, 8, 1], [9]]


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture
def model(method, backbone):
    return build_method(method, backbone.model, **SIZES)


@pytest.fixture
def trained(model):
    """The model with every trainable number moved, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(lengths=(4, 7), total=None, side="right"):
    """Random texts of the given lengths, padded to `total` on one side."""
    generator = torch.Generator().manual_seed(0)
    total = total or max(lengths)
    ids, mask = torch.zeros(len(lengths), total, dtype=torch.long), torch.zeros(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        ids[row, place] = torch.randint(3, 300, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def labels_for(model, batch):
    if model.family == "encoder-decoder":
        return torch.tensor([[5, 1], [7, 1]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return labels.masked_fill(batch["attention_mask"].cumsum(1) <= 2, -100)


def test_parameters_follow_the_formula_and_keep_the_budget(method, model, backbone):
    width = backbone.model.get_input_embeddings().weight.shape[1]
    config = method.configure(EPTConfig(**SIZES))
    assert model.num_trainable_parameters() == config.num_parameters(width)
    assert model.num_trainable_parameters() <= SIZES["prompt_length"] * width
    assert all(name.startswith("prompt.") for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_zeroed_second_factors_give_plain_prompt_tuning(trained, backbone):
    prompt = trained.prompt
    with torch.no_grad():
        for part, factor in (("offset", "embedding_factors"), ("fusion", "strength"), ("projection", "up")):
            if getattr(prompt, part) is not None:
                getattr(getattr(prompt, part), factor).zero_()
    count = len(prompt.embeddings)
    plain = EPTModel(backbone.model, EPTConfig(prompt_length=count, short_length=count, rank=0, fusion=False, projection=False))
    plain.prompt.embeddings = prompt.embeddings
    batch = inputs()
    batch["labels"] = labels_for(trained, batch)
    assert_close(trained(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-6)


def test_padding_changes_nothing(trained):
    short, long = inputs(total=7), inputs(total=12)
    assert_close(trained.score(**short, candidates=CANDIDATES), trained.score(**long, candidates=CANDIDATES), rtol=1e-5, atol=1e-5)
    left = inputs(total=9, side="left")
    assert_close(trained.score(**short, candidates=CANDIDATES), trained.score(**left, candidates=CANDIDATES), rtol=1e-5, atol=1e-5)
    if trained.family == "encoder-decoder":
        target = torch.tensor([[5, 1], [7, 1]])
        assert_close(trained(**short, labels=target).logits, trained(**long, labels=target).logits, rtol=1e-5, atol=1e-5)
    else:
        chosen = trained(**short).logits[short["attention_mask"] == 1]
        assert_close(chosen, trained(**long).logits[long["attention_mask"] == 1], rtol=1e-5, atol=1e-5)
        assert_close(chosen, trained(**left).logits[left["attention_mask"] == 1], rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_prompt_alone(method, trained, backbone):
    before = copy.deepcopy(backbone.model.state_dict())
    batch = inputs()
    loss = trained.train()(**batch, labels=labels_for(trained, batch)).loss
    assert not trained.backbone.training
    if not method.trained:
        assert not loss.requires_grad
        return
    loss.backward()
    torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == name.startswith("prompt."), name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"
    after = backbone.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shared_prefix_is_exact_with_its_gradients(method, trained):
    if trained.family == "encoder-decoder":
        assert trained.shared_prefix  # has no meaning there
        return
    batch = inputs()
    batch["labels"] = labels_for(trained, batch)
    results = []
    for shared in (True, False):
        trained.shared_prefix = shared
        trained.zero_grad()
        out = trained(**batch)
        if method.trained:
            out.loss.backward()
        results.append((out.loss, out.logits[batch["attention_mask"] == 1], [p.grad for p in trained.parameters() if p.requires_grad]))
    (loss, logits, gradients), (plain_loss, plain_logits, plain_gradients) = results
    assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, plain_gradients):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_labelled_logits_alone_give_the_same_loss(trained):
    batch = inputs()
    batch["labels"] = labels_for(trained, batch)
    assert_close(trained(**batch, only_labelled=True).loss, trained(**batch).loss, rtol=1e-6, atol=1e-6)


def test_a_score_is_the_loss_of_the_candidate(trained):
    batch = inputs(lengths=(6,))
    scores = trained.score(**batch, candidates=CANDIDATES)
    for column, candidate in enumerate(CANDIDATES):
        answer = torch.tensor([candidate])
        if trained.family == "encoder-decoder":
            loss = trained(**batch, labels=answer).loss
        else:
            ids = torch.cat([batch["input_ids"], answer], dim=1)
            loss = trained(input_ids=ids, labels=torch.cat([torch.full((1, 6), -100), answer], dim=1)).loss
        assert_close(scores[0, column], -loss.detach() * len(candidate), rtol=1e-4, atol=1e-4)


def test_save_and_load_into_a_fresh_backbone(trained, backbone, tmp_path):
    fresh = EPTModel.from_pretrained(copy.deepcopy(backbone.model), trained.save_pretrained(tmp_path / "adapter"))
    batch = inputs()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(fresh.score(**batch, candidates=CANDIDATES), trained.score(**batch, candidates=CANDIDATES))
    assert torch.equal(fresh.generate(**batch, **options), trained.generate(**batch, **options))
    assert fresh.num_trainable_parameters() == trained.num_trainable_parameters()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * trained.num_trainable_parameters() + 1500


def test_folding_keeps_the_function(trained, backbone, tmp_path):
    folded = trained.fold()
    batch = inputs()
    expected = trained.score(**batch, candidates=CANDIDATES)
    assert folded.num_trainable_parameters() == 0
    assert_close(folded.score(**batch, candidates=CANDIDATES), expected, rtol=1e-6, atol=1e-6)
    again = EPTModel.from_pretrained(backbone.model, folded.save_pretrained(tmp_path / "folded"))
    assert again.folded
    assert_close(again.score(**batch, candidates=CANDIDATES), expected, rtol=1e-6, atol=1e-6)


def test_generate_equals_the_route_by_hand(trained):
    batch = inputs(lengths=(7, 7))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    prompt, offset = trained.prompt()
    text = trained.backbone.get_input_embeddings()(batch["input_ids"])
    if offset is not None:
        text = text + offset[:7]
    embeddings = torch.cat([prompt.expand(2, -1, -1), text], dim=1)
    by_hand = trained.backbone.generate(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]).long(), **options)
    assert torch.equal(trained.generate(**batch, **options), by_hand)


def test_generation_does_not_see_padding(trained):
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = trained.generate(**inputs(lengths=(4, 7)), **options)
    alone = inputs(lengths=(4, 7))
    first = trained.generate(alone["input_ids"][:1, :4], **options)
    assert torch.equal(together[:1], first)


def test_bfloat16_backbone_with_float32_prompt_trains(method, backbone):
    model = build_method(method, copy.deepcopy(backbone.model).to(torch.bfloat16), **SIZES).train()
    if not method.trained:
        return
    batch, losses = inputs(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(15):
        loss = model(**batch, labels=labels_for(model, batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {p.dtype for p in model.prompt.parameters()} == {torch.float32}
    assert losses[-1] < losses[0]


def test_gate_weights_sum_to_one(method, trained):
    if trained.prompt.projection is None:
        with pytest.raises(ValueError, match="this prompt has no gate"):
            trained.gate_weights()
        return
    weights = trained.gate_weights()
    assert weights.shape == (trained.prompt_config.short_length, trained.prompt_config.spaces)
    assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_the_same_seed_gives_the_same_start(method, backbone):
    one, same = build_method(method, backbone.model, **SIZES), build_method(method, backbone.model, **SIZES)
    other = build_method(method, backbone.model, **SIZES | {"seed": 4})
    for (name, a), b, c in zip(one.prompt.named_parameters(), same.prompt.parameters(), other.prompt.parameters()):
        assert torch.equal(a, b), name
    if method.trained:
        assert not torch.equal(one.prompt.embeddings, other.prompt.embeddings)


def test_every_ablation_differs_from_ept_in_what_it_names():
    ept = METHODS["ept"].configure(EPTConfig())
    assert METHODS["ept-no-fusion"].configure(EPTConfig()) == replace(ept, fusion=False)
    assert METHODS["ept-no-projection"].configure(EPTConfig()) == replace(ept, projection=False)
    assert METHODS["ept-one-space"].configure(EPTConfig()) == replace(ept, spaces=1, space_width=8)
    assert METHODS["dept"].configure(EPTConfig()) == replace(ept, fusion=False, projection=False)
