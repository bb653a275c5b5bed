"""One battery over every method and every backbone: adding a method means adding nothing here."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ept.methods.catalogue import SHARED
from ept.methods.ept_token import TokenPrompt
from ept.methods.registry import METHODS, build_method, num_parameters
from ept.methods.sources import SOURCE_TASKS
from ept.model.modeling import EPTModel
from ept.prompt.soft import EPTConfig, SoftPrompt
from tests.conftest import DEVICE, perturbed

SIZES = dict(prompt_length=40, short_length=6, max_length=12, spaces=3, space_width=1, fusion_width=2, seed=3)
SIZES |= dict(residual_width=5, attention_width=7, adapter_width=3, lora_rank=2)
CANDIDATES = [[5, 1], [7, 8, 1], [9]]


def only(which):
    """A test for some of the methods."""
    return pytest.mark.parametrize("method", [name for name, method in METHODS.items() if which(method)], indirect=True)


def has_gate(method):
    """Whether a method weighs spaces."""
    config = method.resolve({})[0]
    return not method.adapts and config.projection and config.modules != "spared"


family = only(lambda method: method.kind in (SoftPrompt, TokenPrompt))  # EPT's own
adaptations = only(lambda method: method.adapts)
trainable = only(lambda method: method.trained)
constants = only(lambda method: not method.adapts and not method.reads_text)
no_constants = only(lambda method: method.adapts or method.reads_text)
gated = only(lambda method: has_gate(method) and not method.resolve({})[0].text_gate)
without_gate = only(lambda method: not has_gate(method))
decoder_only = pytest.mark.parametrize("backbone", ["llama", "gpt2"], indirect=True)


@pytest.fixture(params=list(METHODS))
def method(request):
    return METHODS[request.param]


@pytest.fixture
def model(method, backbone):
    return build(method, backbone.model)


def build(method, model, **changes):
    "A method with small sizes; the prompts of source tasks are random, and always the same."
    generator, width = torch.Generator().manual_seed(9), model.get_input_embeddings().weight.shape[1]
    sources = {task: torch.randn(SIZES["prompt_length"], width, generator=generator) for task in (*SOURCE_TASKS, SHARED)}
    return build_method(method, model, source_prompts=sources, **SIZES | changes)


@pytest.fixture
def trained(model):
    """The model with every trainable parameter changed, as training would."""
    return perturbed(model)


def inputs(lengths=(4, 7), total=None, side="right"):
    """Random texts of the given lengths, padded to `total` on one side."""
    generator = torch.Generator().manual_seed(0)
    total = total or max(lengths)
    ids, mask = torch.zeros(len(lengths), total, dtype=torch.long), torch.zeros(len(lengths), total, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        ids[row, place] = torch.randint(3, 300, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def labels_for(model, batch):
    if model.family == "encoder-decoder":
        return torch.tensor([[5, 1], [7, 1]], device=DEVICE)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return labels.masked_fill(batch["attention_mask"].cumsum(1) <= 2, -100)


def test_parameters_follow_the_formula(method, model, backbone):
    assert model.num_trainable_parameters() == num_parameters(method, backbone.model, **SIZES)
    start = "backbone." if method.adapts else "prompt."
    assert all(name.startswith(start) for name, parameter in model.named_parameters() if parameter.requires_grad)


@family
def test_the_family_of_ept_keeps_to_the_budget(method, model, backbone):
    assert model.num_trainable_parameters() <= SIZES["prompt_length"] * backbone.model.get_input_embeddings().weight.shape[1]


def test_what_is_trained_is_float32_and_has_a_learning_rate(method, model):
    groups = model.parameter_groups()
    named = {name for group in groups.values() for name in group}
    assert named == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} <= {torch.float32}
    assert bool(groups["weights"]) == method.adapts
    assert bool(groups["prompt"]) == (method.trained and not method.adapts)


@adaptations
def test_at_the_start_an_adapted_backbone_is_the_plain_one(method, model, backbone):
    plain, batch = build(METHODS["frozen"], backbone.model), inputs()
    assert torch.equal(model.score(**batch, candidates=CANDIDATES), plain.score(**batch, candidates=CANDIDATES))
    batch["labels"] = labels_for(model, batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@family
def test_zeroed_second_factors_give_plain_prompt_tuning(method, trained, backbone):
    prompt = trained.prompt
    with torch.no_grad():
        for part, factor in (("offset", "embedding_factors"), ("fusion", "strength"), ("projection", "up"), ("network", "2.weight"), ("network", "2.bias")):
            if getattr(prompt, part, None) is not None:
                getattr(prompt, part).get_parameter(factor).zero_()
    count = len(prompt.embeddings)
    plain = EPTModel(backbone.model, EPTConfig(prompt_length=count, short_length=count).plain())
    with torch.no_grad():
        plain.prompt.embeddings.copy_(prompt.short_prompt())
    batch = inputs()
    batch["labels"] = labels_for(trained, batch)
    assert_close(trained(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-6)


def test_padding_changes_nothing(trained):
    short, long = inputs(total=7), inputs(total=12)
    assert_close(trained.score(**short, candidates=CANDIDATES), trained.score(**long, candidates=CANDIDATES), rtol=1e-5, atol=1e-5)
    left = inputs(total=9, side="left")
    assert_close(trained.score(**short, candidates=CANDIDATES), trained.score(**left, candidates=CANDIDATES), rtol=1e-5, atol=1e-5)
    if trained.family == "encoder-decoder":
        target = labels_for(trained, short)
        assert_close(trained(**short, labels=target).logits, trained(**long, labels=target).logits, rtol=1e-5, atol=1e-5)
    else:
        chosen = trained(**short).logits[short["attention_mask"] == 1]
        assert_close(chosen, trained(**long).logits[long["attention_mask"] == 1], rtol=1e-5, atol=1e-5)
        assert_close(chosen, trained(**left).logits[left["attention_mask"] == 1], rtol=1e-5, atol=1e-5)


@only(lambda method: not method.trained)
def test_nothing_to_train_has_no_gradient(method, model):
    batch = inputs()
    assert not model.train()(**batch, labels=labels_for(model, batch)).loss.requires_grad


@trainable
def test_gradients_reach_what_is_trained_alone(method, trained, backbone):
    before = copy.deepcopy(backbone.model.state_dict())
    batch = inputs()
    loss = trained.train()(**batch, labels=labels_for(trained, batch)).loss
    assert not trained.backbone.training
    loss.backward()
    frozen = {name: p.clone() for name, p in trained.named_parameters() if not p.requires_grad}
    torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, f"no gradient reaches {name}"
        else:
            assert torch.equal(parameter, frozen[name]), name
    after = backbone.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


def test_methods_on_one_backbone_do_not_meet(method, trained, backbone):
    other = build(method, backbone.model)
    ours, theirs = ({id(p): n for n, p in m.named_parameters()} for m in (trained, other))
    shared = {name for key, name in ours.items() if key in theirs}
    assert not any(name in shared for name, p in trained.named_parameters() if p.requires_grad)
    if method.name != "finetune":  # what is frozen is there once, for all of them
        own = {id(p) for p in backbone.model.parameters()}
        assert own <= ours.keys() and own <= theirs.keys()


@decoder_only
def test_shared_prefix_is_exact_with_its_gradients(method, trained):
    batch = inputs()
    batch["labels"] = labels_for(trained, batch)
    results = []
    for shared in (True, False):
        trained.architecture.shared_prefix = shared
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
        answer = torch.tensor([candidate], device=DEVICE)
        if trained.family == "encoder-decoder":
            loss = trained(**batch, labels=answer).loss
        else:
            ids = torch.cat([batch["input_ids"], answer], dim=1)
            loss = trained(input_ids=ids, labels=torch.cat([torch.full_like(batch["input_ids"], -100), answer], dim=1)).loss
        assert_close(scores[0, column], -loss.detach() * len(candidate), rtol=1e-4, atol=1e-4)


def test_save_and_load_into_a_fresh_backbone(trained, backbone, tmp_path):
    fresh = EPTModel.from_pretrained(copy.deepcopy(backbone.model), trained.save_pretrained(tmp_path / "adapter"))
    numbers = sum(t.numel() for t in trained.adapter_tensors().values())
    batch = inputs()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(fresh.score(**batch, candidates=CANDIDATES), trained.score(**batch, candidates=CANDIDATES))
    assert torch.equal(fresh.generate(**batch, **options), trained.generate(**batch, **options))
    assert fresh.num_trainable_parameters() == trained.num_trainable_parameters()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * numbers + 1500 + 150 * len(trained.adapter_tensors())


def test_an_adapter_is_refused_by_another_backbone(trained, backbone, tmp_path):
    folder, other = trained.save_pretrained(tmp_path / "adapter"), copy.deepcopy(backbone.model)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(ValueError, match="with other weights than this backbone has"):
        EPTModel.from_pretrained(other, folder)


@no_constants
def test_what_is_no_constant_does_not_fold(method, trained):
    with pytest.raises(ValueError, match="use the model as it is"):
        trained.fold()


@constants
def test_folding_keeps_the_function(method, trained, backbone, tmp_path):
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
    text = trained.backbone.get_input_embeddings()(batch["input_ids"])
    prompt, offset = trained.prompt(text, batch["attention_mask"] > 0) if trained.reads_text else trained.prompt()
    if offset is not None:
        text = text + offset[..., :7, :]
    embeddings = torch.cat([prompt.expand(2, -1, -1), text], dim=1)
    by_hand = trained.backbone.generate(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=DEVICE), **options)
    assert torch.equal(trained.generate(**batch, **options), by_hand)


def test_generation_does_not_see_padding(trained):
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = trained.generate(**inputs(lengths=(4, 7)), **options)
    alone = inputs(lengths=(4, 7))
    first = trained.generate(alone["input_ids"][:1, :4], **options)
    assert torch.equal(together[:1], first)


@trainable
def test_bfloat16_backbone_with_float32_prompt_trains(method, backbone):
    model = build(method, copy.deepcopy(backbone.model).to(torch.bfloat16)).train()
    batch, losses = inputs(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005 if method.adapts else 0.05)
    for _ in range(15):
        loss = model(**batch, labels=labels_for(model, batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**batch, labels=labels_for(model, batch)).logits.dtype == (torch.float32 if method.name == "finetune" else torch.bfloat16)
    assert losses[-1] < losses[0]


@without_gate
def test_a_prompt_without_a_gate_says_so(method, trained):
    with pytest.raises(ValueError, match="this prompt has no gate"):
        trained.gate_weights()


@gated
def test_gate_weights_sum_to_one(method, trained):
    weights = trained.gate_weights()
    assert weights.shape == (trained.prompt_config.short_length, trained.prompt_config.spaces)
    assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))


def test_the_same_seed_gives_the_same_start(method, backbone):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = build(method, backbone.model), build(method, backbone.model), build(method, backbone.model, seed=4)
    assert torch.equal(before, torch.random.get_rng_state()), "building a method leaves torch's own generator alone"
    for name, tensor in one.adapter_tensors().items():
        assert torch.equal(tensor, same.adapter_tensors()[name]), name
    if method.trained and method.name not in ("finetune", "bitfit", "spot", "mpt"):  # their start is given, not drawn
        assert any(not torch.equal(tensor, other.adapter_tensors()[name]) for name, tensor in one.adapter_tensors().items())


def test_every_ablation_differs_from_ept_in_what_it_names():
    ept = METHODS["ept"].resolve({})[0]
    assert METHODS["ept-no-fusion"].resolve({})[0] == replace(ept, fusion=False)
    assert METHODS["ept-no-projection"].resolve({})[0] == replace(ept, projection=False)
    assert METHODS["ept-one-space"].resolve({})[0] == replace(ept, spaces=1, space_width=8)
    assert METHODS["dept"].resolve({})[0] == replace(ept, fusion=False, projection=False)
