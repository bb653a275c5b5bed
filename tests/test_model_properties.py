"""For any input a right answer or one of our errors, never another exception and never a silent change: what Hypothesis thinks of."""

import copy
import json
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch.testing import assert_close

from ept.methods.registry import build_method
from ept.model.modeling import EPTModel
from ept.model.saving import adapter_digest
from tests.conftest import MODELS, VOCABULARY, perturbed

SIZES = dict(prompt_length=40, short_length=6, max_length=12, spaces=3, space_width=1, fusion_width=2)
FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@cache
def model_of(kind, method="ept"):
    """One model for all examples: nothing that it is given may change it."""
    return perturbed(build_method(method, MODELS[kind](), **SIZES))


def unchanged(model):
    """The sum over all that a model holds; it stays the same to the bit."""
    return [float(t.double().sum()) for t in model.state_dict().values()]


# ---- batches --------------------------------------------------------------------------------------------------------------

TOKENS = st.integers(3, VOCABULARY - 1)
ODD_TOKENS = st.sampled_from([-100, -1, VOCABULARY, 2**40])


@st.composite
def batches(draw):
    """Token ids and a mask, often right, and wrong in every way that a caller has thought of."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape = lambda values: draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=rows, max_size=rows))
    ids, mask = torch.tensor(shape(TOKENS)), torch.tensor(shape(st.integers(0, 1)))
    mask[:, draw(st.integers(0, length - 1))] = 1
    wrong = draw(st.sampled_from([None, None, None, "id", "mask", "empty", "dtype", "shape", "list", "mask dtype"]))
    if wrong == "id":
        ids[draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1))] = draw(ODD_TOKENS)
    if wrong == "mask":
        mask[0, 0] = draw(st.sampled_from([-1, 2, 255]))
    if wrong == "empty":
        mask[draw(st.integers(0, rows - 1))] = 0
    if wrong == "dtype":
        ids = ids.to(draw(st.sampled_from([torch.float32, torch.int16, torch.bool, torch.complex64])))
    if wrong == "shape":
        ids, mask = draw(st.sampled_from([(ids[0], mask[0]), (ids, mask[:, :-1]), (ids[None], mask[None]), (ids[:, :0], mask[:, :0]), (ids, mask[0])]))
    if wrong == "list":
        ids = ids.tolist()
    if wrong == "mask dtype":
        mask = draw(st.sampled_from([mask.float(), mask.tolist(), mask.to("meta")]))
    if wrong is None:
        ids = ids.to(draw(st.sampled_from([torch.int64, torch.int32])))
        mask = mask.to(draw(st.sampled_from([torch.int64, torch.bool, torch.uint8])))
    return ids, mask, wrong


def answer(call, wrong):
    """What a call returns; None where it refuses a wrong input by name. Anything else fails."""
    try:
        found = call()
    except ValueError as error:
        assert wrong, f"a right input was refused: {error}"
        assert str(error).partition(" ")[0] in ("input_ids", "attention_mask", "labels", "candidates", "row", "prompt,", "the"), error
        return None
    assert not wrong, f"a wrong input was accepted: {wrong}"
    return found


def alone(ids, mask):
    """Each text of a batch by itself, without padding."""
    return [row[real.bool()].long()[None] for row, real in zip(ids, mask)]


@pytest.mark.parametrize("kind", MODELS)
class TestBatches:
    @FEW
    @given(batches(), st.data())
    def test_forward_gives_the_loss_of_each_text_alone_or_refuses(self, kind, batch, data):
        model, (ids, mask, wrong) = model_of(kind), batch
        inside, before = model.family == "decoder-only", unchanged(model)
        rows, length = (ids.shape if isinstance(ids, torch.Tensor) and ids.dim() == 2 else (1, 1))[:2]
        width = length if inside else 3
        labels = torch.tensor(data.draw(st.lists(st.lists(TOKENS, min_size=width, max_size=width), min_size=rows, max_size=rows))).view(rows, width)
        if inside and not wrong:
            labels[~mask.bool()] = -100
        odd = data.draw(st.sampled_from([None, None, "ignored", "token", "shape", "float"]))
        if odd == "ignored":
            labels[:] = -100
        if odd == "token" and labels.numel():
            labels[0, 0] = data.draw(st.sampled_from([-1, -99, VOCABULARY]))
        if odd == "shape":
            labels = labels[:, :0]
        if odd == "float":
            labels = labels.float()
        found = answer(lambda: model(input_ids=ids, attention_mask=mask, labels=labels), wrong or odd)
        assert unchanged(model) == before
        if found is not None:
            texts, answers = alone(ids, mask), [row[real.bool()][None] if inside else row[None] for row, real in zip(labels, mask)]
            losses = [model(input_ids=text, labels=target).loss * target.numel() for text, target in zip(texts, answers)]
            assert_close(found.loss, sum(losses) / sum(t.numel() for t in answers), rtol=1e-4, atol=1e-4)

    @FEW
    @given(batches(), st.lists(st.lists(st.one_of(TOKENS, TOKENS, TOKENS, ODD_TOKENS), max_size=3), max_size=3))
    @example((torch.tensor([[5, 6]]), torch.tensor([[1, 1]]), None), [[-1]])
    @example((torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [1, 0]]), None), [[3, 4, 5], [3, 4], [3, 4, 6], [9], [3, 7]])
    def test_score_gives_the_probability_after_each_text_alone_or_refuses(self, kind, batch, candidates):
        model, (ids, mask, wrong) = model_of(kind), batch
        before = unchanged(model)
        odd = not candidates or any(not c or any(not 0 <= token < VOCABULARY for token in c) for c in candidates)
        found = answer(lambda: model.score(input_ids=ids, attention_mask=mask, candidates=candidates), wrong or odd)
        assert unchanged(model) == before
        if found is not None:
            apart = [model.score(input_ids=text, candidates=[c]) for text in alone(ids, mask) for c in candidates]
            assert_close(found, torch.cat(apart).view(len(ids), -1), rtol=1e-4, atol=1e-4)

    def test_what_candidates_share_is_read_once(self, kind):
        model = model_of(kind)

        def read(candidates):
            "The number of positions after which a token is predicted."
            head, found = model.backbone.get_output_embeddings(), []
            with head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[:-1].numel())):
                model.score(input_ids=torch.tensor([[5, 6]]), candidates=candidates)
            return sum(found)

        last, third = [[5, 6, 7, token] for token in range(8, 16)], [[5, 6, token, 7] for token in range(8, 16)]
        assert read(last) == read(last[:1]) == 1 + 3
        assert read(third) == 1 + 8 * 3

    @settings(FEW, max_examples=10)
    @given(batches())
    def test_generate_continues_each_text_as_it_does_alone_or_refuses(self, kind, batch):
        model, (ids, mask, wrong) = model_of(kind), batch
        options = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False)
        found = answer(lambda: model.generate(input_ids=ids, attention_mask=mask, **options), wrong)
        if found is not None:
            assert torch.equal(found, torch.cat([model.generate(input_ids=text, **options) for text in alone(ids, mask)]))


@pytest.mark.parametrize("candidates", [[3, 1], ["no", "yes"], [[1.5]], [None], 7, [[[3]]], torch.zeros(2, 2)])
def test_candidates_that_are_no_token_ids_are_refused(candidates):
    with pytest.raises(ValueError, match="(?s)candidates are .*; give token ids of each candidate, a list of lists of integers"):
        model_of("llama").score(input_ids=torch.tensor([[5, 6]]), candidates=candidates)


def test_a_text_beyond_the_positions_of_the_backbone_is_refused():
    model = perturbed(build_method("pt", MODELS["gpt2"](), **SIZES | {"prompt_length": 10}))
    ids = torch.full((1, 246), 5)
    assert torch.isfinite(model.score(input_ids=ids, candidates=[[3], [4]])).all(), "10 + 246 tokens have room in 256 positions"
    for call in (
        lambda: model(input_ids=torch.full((1, 247), 5)),
        lambda: model.score(input_ids=ids, candidates=[[3, 4]]),
        lambda: model.generate(input_ids=torch.full((1, 247), 5), max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match="have 257 tokens, this backbone has 256 positions; cut the text"):
            call()


# ---- adapter files --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 60), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@cache
def files_of(kind, method="ept"):
    """Configuration and tensors of a saved adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model_of(kind, method).save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes(), (Path(folder) / "adapter_model.safetensors").read_bytes()


@cache
def fresh(kind):
    """A backbone to load adapters on."""
    return MODELS[kind]()


def read(kind, config, weights):
    """The model of an adapter's two files; None where they are refused. The backbone stays as it is in any case."""
    backbone = fresh(kind)
    before = copy.deepcopy(backbone.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_bytes(config)
        (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
        try:
            model = EPTModel.from_pretrained(backbone, folder)
        except ValueError as error:
            assert folder in str(error), f"which adapter? {error}"
            model = None
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    return model


def same(model, other):
    """Whether two models have the same sizes and the same numbers, to the bit."""
    ours, theirs = model.adapter_tensors(), other.adapter_tensors()
    return (asdict(model.prompt_config), model.extra) == (asdict(other.prompt_config), other.extra) and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("method", ["ept", "lora"])
class TestAdapterFiles:
    @settings(FEW, max_examples=40)
    @given(st.data())
    def test_damage_is_refused_or_makes_no_difference(self, method, data):
        files = list(map(bytearray, files_of("t5", method)))
        damaged = files[data.draw(st.integers(0, 1))]
        for _ in range(data.draw(st.integers(1, 2))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        if data.draw(st.booleans()):
            del damaged[data.draw(st.integers(0, len(damaged))) :]
        model = read("t5", *map(bytes, files))
        assert model is None or same(model, model_of("t5", method))

    @settings(FEW, max_examples=40)
    @given(st.data())
    def test_an_edited_configuration_is_refused(self, method, data):
        config, weights = files_of("t5", method)
        record = json.loads(config)
        where = record if data.draw(st.booleans()) else record[data.draw(st.sampled_from(sorted(k for k, v in record.items() if isinstance(v, dict))))]
        name = data.draw(st.sampled_from(sorted(where)))
        value = data.draw(JSON)
        where[name] = value
        model = read("t5", json.dumps(record).encode(), weights)
        if json.dumps(record, sort_keys=True) == json.dumps(json.loads(config), sort_keys=True):
            assert same(model, model_of("t5", method))
        else:
            assert model is None

    @settings(FEW, max_examples=40)
    @given(st.data())
    def test_a_configuration_with_a_checksum_that_fits_is_what_is_loaded_or_refused(self, method, data):
        """Somebody has made the checksum anew: there is nothing to tell it by but what it says."""
        config, weights = files_of("t5", method)
        record = json.loads(config)
        where = record[data.draw(st.sampled_from(sorted(k for k, v in record.items() if isinstance(v, dict))))]
        where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
        model = read("t5", json.dumps(record | {"sha256": adapter_digest(record, weights)}).encode(), weights)
        if model is not None:
            for loaded, said in ((asdict(model.prompt_config), record["config"]), (asdict(model.extra) if model.extra else {}, record.get("extra", {}))):
                assert {name: loaded[name] for name in said if said[name] is not None} == {name: value for name, value in said.items() if value is not None}
            assert all(torch.isfinite(t).all() for t in model.adapter_tensors().values())

    @settings(FEW, max_examples=30)
    @given(st.data())
    def test_other_tensors_with_a_checksum_that_fits_are_refused(self, method, data):
        config, weights = files_of("t5", method)
        record, tensors = json.loads(config), load_safetensors(weights)
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        change = data.draw(
            st.sampled_from(
                [
                    lambda t: {name: t.to(torch.int32)},
                    lambda t: {name: t.double()},
                    lambda t: {name: t.bool()},
                    lambda t: {name: torch.full_like(t, float("nan"))},
                    lambda t: {name: t + float("inf")},
                    lambda t: {name: t[None]},
                    lambda t: {name: torch.cat([t.flatten(), t.flatten()])},
                    lambda t: {name: t.flatten()[:-1]},
                    lambda t: {f"{name}x": t.clone()},
                ]
            )
        )(tensor)
        weights = save_safetensors(tensors | change)
        assert read("t5", json.dumps(record | {"sha256": adapter_digest(record, weights)}).encode(), weights) is None
