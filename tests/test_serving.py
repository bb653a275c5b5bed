"""Prompts where only embeddings go in, and many prompts on one backbone."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

from ept.methods.registry import METHODS
from ept.model.bank import PromptBank
from ept.model.modeling import EPTModel
from ept.model.serving import encode_embeds, prompt_embeds
from tests.completions import serving
from tests.conftest import VOCABULARY, WIDTH, perturbed, tiny_backbone
from tests.test_battery import build

TEXTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]
IDS = torch.tensor([text + [0] * (7 - len(text)) for text in TEXTS])
MASK = (IDS > 0).long()
OPTIONS = dict(max_new_tokens=5, do_sample=False)
CONSTANT = [name for name, method in METHODS.items() if not method.adapts and not method.reads_text]
OTHER = [name for name in METHODS if name not in CONSTANT]
decoder_only = pytest.mark.parametrize("backbone", ["llama", "gpt2"], indirect=True)


def trained(method, backbone, **changes):
    return perturbed(build(METHODS[method], backbone.model, **changes))


# ---- a server that takes embeddings -----------------------------------------------------------------------------------


def ask(address, **request):
    """What a completion request is answered."""
    request = {"model": "tiny", "max_tokens": 5, "temperature": 0, "return_token_ids": True, **request}
    call = Request(f"{address}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urlopen(call, timeout=30) as answer:
        return json.load(answer)["choices"]


@decoder_only
def test_a_server_goes_on_as_the_model_does(backbone):
    """One server, which knows the backbone alone, and prompts of every kind: one that reads the text is computed by the client."""
    with serving(backbone.model, backbone.tokenizer) as address:
        for method in ("ept", "dept", "pt", "respt", "attempt", "adept", "ept-token", "ept-text-gate", "frozen"):
            model = trained(method, backbone)
            sent = [encode_embeds(row) for row in prompt_embeds(model, TEXTS)]
            expected = [model.generate(torch.tensor([text]), **OPTIONS)[0].tolist() for text in TEXTS]
            assert [choice["token_ids"] for choice in ask(address, prompt_embeds=sent)] == expected, method
            assert ask(address, prompt_embeds=sent[0])[0]["text"] == backbone.tokenizer.decode(expected[0], skip_special_tokens=True)


@decoder_only
def test_prompts_matter_there(backbone):
    "Otherwise the test above would see nothing."
    answers = {method: prompt_embeds(trained(method, backbone), TEXTS[:1])[0] for method in ("ept", "pt", "frozen")}
    logits = [backbone.model(inputs_embeds=row[None]).logits[0, -1] for row in answers.values()]
    assert (logits[0] - logits[1]).abs().max() > 0.01 and (logits[1] - logits[2]).abs().max() > 0.01


def test_what_is_no_prompt_is_refused_by_a_server():
    backbone, row = tiny_backbone("llama"), torch.zeros(3, WIDTH)
    wrong = ["no base64", encode_embeds(row[0]), encode_embeds(row[:, 1:]), encode_embeds(row.long())]
    with serving(backbone.model, backbone.tokenizer) as address:
        for sent in wrong:
            with pytest.raises(HTTPError, match="400"):
                ask(address, prompt_embeds=sent)


def test_the_rows_are_those_that_the_backbone_is_given(backbone):
    """Encoder-decoder models too, though vLLM serves none: prompt, text and offset, in the backbone's number format."""
    model, seen = trained("ept", backbone), []
    embed = backbone.model.get_input_embeddings()
    prompt, offset = model.prompt()
    for text, row, folded in zip(TEXTS, prompt_embeds(model, TEXTS), prompt_embeds(model.fold(), TEXTS)):
        assert_close(row, torch.cat([prompt, embed(torch.tensor(text)) + offset[: len(text)]]), rtol=1e-5, atol=1e-5)
        assert torch.equal(row, folded) and not row.requires_grad
        seen.append(len(row))
    assert seen == [len(prompt) + len(text) for text in TEXTS]
    half = EPTModel(tiny_backbone("llama").model.bfloat16(), prompt=model.fold().prompt)
    assert prompt_embeds(half, TEXTS)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adapts])
def test_what_is_trained_inside_cannot_be_sent(method):
    model = build(METHODS[method], tiny_backbone("llama").model)
    with pytest.raises(ValueError, match=rf"inside the backbone \({model.adaptation.kind}\), which embeddings cannot carry"):
        prompt_embeds(model, TEXTS)


# ---- a bank -----------------------------------------------------------------------------------------------------------

MIXED = ["ept", "pt", "frozen", "dept", "ept", "respt"]
CANDIDATES = {"ept": [[5, 1], [7, 8, 1], [9]], "pt": [[4, 4], [3]], "frozen": [[5], [6]], "dept": [[5, 1], [7, 1]], "respt": [[8], [9, 9], [3, 2, 1]]}


@pytest.fixture
def models(backbone):
    changes = {"pt": dict(prompt_length=9, short_length=4), "dept": dict(short_length=3)}
    return {name: trained(name, backbone, **changes.get(name, {})) for name in CANDIDATES}


@pytest.fixture
def bank(backbone, models):
    return PromptBank(backbone.model, models)


def mixed_rows():
    texts = [TEXTS[i % 3] for i in range(len(MIXED))]
    ids = torch.tensor([text + [0] * (7 - len(text)) for text in texts])
    return texts, ids, (ids > 0).long()


def test_prompts_of_a_bank_differ_in_length(bank):
    assert len({bank._length(name) for name in MIXED}) >= 4


@pytest.mark.parametrize("shared", [True, False])
def test_a_mixed_batch_scores_as_one_at_a_time(bank, models, shared):
    """By the kept keys and values of prompts, and by the plain way, which is that of encoder-decoder models."""
    bank.keeps_prefixes &= shared
    texts, ids, mask = mixed_rows()
    together, same = bank.score(MIXED, ids, mask, CANDIDATES), bank.score(MIXED, ids, mask, [[5, 1], [9]])
    for row, (name, text) in enumerate(zip(MIXED, texts)):
        alone = lambda candidates: models[name].score(torch.tensor([text]), candidates=candidates)[0]  # noqa: B023
        assert_close(together[row, : len(CANDIDATES[name])], alone(CANDIDATES[name]), rtol=0, atol=1e-5)
        assert together[row, len(CANDIDATES[name]) :].isneginf().all()
        assert_close(same[row], alone([[5, 1], [9]]), rtol=0, atol=1e-5)


def test_a_mixed_batch_generates_as_one_at_a_time(bank, models):
    texts, ids, mask = mixed_rows()
    options = dict(OPTIONS, return_dict_in_generate=True, output_logits=True, min_new_tokens=5)
    together = bank.generate(MIXED, ids, mask, **options)
    for row, (name, text) in enumerate(zip(MIXED, texts)):
        alone = models[name].generate(torch.tensor([text]), **options)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for ours, other in zip(together.logits, alone.logits, strict=True):
            assert_close(ours[row], other[0], rtol=0, atol=1e-5)


def test_padding_and_other_rows_do_not_matter(bank):
    _, ids, mask = mixed_rows()
    whole = bank.score(MIXED, ids, mask, [[5, 1], [9]])
    order = [3, 0, 5]
    assert_close(bank.score(MIXED, left_padded(ids), left_padded(mask), [[5, 1], [9]]), whole, rtol=0, atol=1e-5)
    assert_close(bank.score([MIXED[i] for i in order], ids[order], mask[order], [[5, 1], [9]]), whole[order], rtol=0, atol=1e-5)


def left_padded(rows):
    """The same rows with their padding on the left."""
    return torch.stack([torch.cat([row[row == 0], row[row != 0]]) for row in rows])


@pytest.mark.parametrize("method", CONSTANT)
def test_constants_go_into_a_bank(method):
    backbone = tiny_backbone("llama")
    model = trained(method, backbone)
    bank = PromptBank(backbone.model, {"a": model, "b": model.fold()})
    scores = bank.score(["a", "b"], IDS[[0, 0]], MASK[[0, 0]], [[5, 1], [9]])
    assert_close(scores, model.score(IDS[[0, 0]], MASK[[0, 0]], [[5, 1], [9]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", OTHER)
def test_other_methods_are_refused_by_name(method):
    backbone = tiny_backbone("llama")
    model, bank = build(METHODS[method], backbone.model), PromptBank(backbone.model)
    kind = (model.adaptation or model.prompt).kind
    with pytest.raises(ValueError, match=rf"prompt 'mine' cannot go into a bank: its method \({kind}\)"):
        bank.add("mine", model)
    assert len(bank) == 0


def test_adapters_are_loaded_replaced_and_removed(backbone, tmp_path):
    model, other = trained("ept", backbone), trained("pt", backbone)
    bank = PromptBank(backbone.model, {"mine": model.save_pretrained(tmp_path / "mine")})
    score = lambda: bank.score(["mine"] * 3, IDS, MASK, [[5, 1], [9]])
    assert_close(score(), model.score(IDS, MASK, [[5, 1], [9]]), rtol=0, atol=1e-5)
    bank.add("mine", other)
    assert_close(score(), other.score(IDS, MASK, [[5, 1], [9]]), rtol=0, atol=1e-5)
    assert bank.names == ("mine",) and "mine" in bank
    bank.remove("mine")
    assert not len(bank)
    with pytest.raises(ValueError, match="unknown prompt 'mine'"):
        score()


def test_mistakes_are_told_before_anything_is_computed(bank, models, tmp_path):
    with pytest.raises(ValueError, match="unknown prompt 'ebt'; did you mean 'ept'"):
        bank.score(["ept", "ebt", "pt"], IDS, MASK, [[5]])
    with pytest.raises(ValueError, match="2 names for 3 rows"):
        bank.generate(["ept", "pt"], IDS, MASK)
    with pytest.raises(ValueError, match="no candidates for prompt 'pt'"):
        bank.score(["ept", "pt", "ept"], IDS, MASK, {"ept": [[5]]})
    with pytest.raises(ValueError, match="none of them empty"):
        bank.score(["ept", "pt", "ept"], IDS, MASK, {"ept": [[5]], "pt": [[4], []]})
    with pytest.raises(ValueError, match="the offset covers s = 12"):
        bank.score(["ept", "pt"], torch.full((2, 13), 5), candidates=[[5]])
    long = torch.full((2, 13), 5)
    long_mask = torch.tensor([[1] * 4 + [0] * 9, [1] * 13])
    assert bank.score(["ept", "pt"], long, long_mask, [[5]]).shape == (2, 1), "a long text of a prompt without offset is no mistake of its neighbour"


def test_another_backbone_is_refused():
    one, other = tiny_backbone("llama"), tiny_backbone("llama")
    bank = PromptBank(one.model, {"same": trained("pt", other)})
    assert bank.names == ("same",), "other tensors with the same numbers are the same backbone"
    with torch.no_grad():
        other.model.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="prompt 'mine' is on another backbone than the bank's"):
        bank.add("mine", trained("pt", other))


def test_a_window_of_attention_reaches_into_prompts_as_without_a_bank():
    torch.manual_seed(1)
    config = MistralConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=6)
    backbone = tiny_backbone("llama")
    backbone.model = MistralForCausalLM(config).eval().requires_grad_(False)
    models = {"ept": trained("ept", backbone), "pt": trained("pt", backbone, prompt_length=9)}
    bank = PromptBank(backbone.model, models)
    together = bank.score(["ept", "pt", "ept"], IDS, MASK, [[5, 1], [9]])
    for row, name in enumerate(["ept", "pt", "ept"]):
        assert_close(together[row], models[name].score(IDS[row : row + 1], MASK[row : row + 1], [[5, 1], [9]])[0], rtol=0, atol=1e-5)
