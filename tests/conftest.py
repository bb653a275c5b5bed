"""What the tests share: tiny backbones of both families with random weights, and a tokenizer that needs no download."""

import gc
import hashlib
import json
import os
import random
import signal
import sys
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from ept.model.backbone import Backbone
from ept.model.saving import FIRST_READING, adapter_digest
from ept.model.weights import sample_fingerprint

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some thousand processes compiles the library anew
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WIDTH, VOCABULARY = 32, 320
DEVICE = os.environ.get("EPT_TEST_DEVICE", "cpu")  # where the tiny backbones are: `EPT_TEST_DEVICE=cuda python -m pytest tests/test_battery.py`
NOTEBOOKS = "tests/test_notebooks.py"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background; what the tests start is to end at Ctrl-C all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models are tiny, and the tests have a process for each core: more threads would wait for each other
gc.freeze()  # the Trainer collects garbage at each start; half a second each time, if it has to go over all imported modules


@cache
def shared(path):
    """Whether the tests of a module share a fixture."""
    return 'scope="module"' in path.read_text(encoding="utf-8")


@cache
def place(path):
    """Where in the order a module comes: with a grid of its own, with a fixture that its tests share, others. What is left for the end is small, and no worker is alone with it."""
    return 0 if shared(path) and "Clone(" in path.read_text(encoding="utf-8") else 2 - shared(path)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place(item.path))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """A worker takes a module whose tests share a fixture, or else the cases of one test; but one notebook after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition("::")
            return path if shared(config.rootpath / path) else nodeid if path == NOTEBOOKS else f"{path}::{test.partition('[')[0]}"

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


def tiny_t5():
    torch.manual_seed(1)
    config = T5Config(d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def tiny_llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2():
    torch.manual_seed(1)
    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


MODELS = {"t5": tiny_t5, "llama": tiny_llama, "gpt2": tiny_gpt2}


def byte_tokenizer(eos):
    """Bytes as tokens: every text can be told, whatever the vocabulary. `eos` appends an end token, as T5's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_backbone(kind):
    model = MODELS[kind]().to(DEVICE)
    return Backbone(model.requires_grad_(False), byte_tokenizer(eos=kind == "t5"), f"tiny-{kind}", "test")


def perturbed(model):
    """The model with every trainable parameter changed, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def seal(folder, **values):
    """Change the configuration and give both files a checksum that fits, as somebody would who knows how it is made."""
    path, weights = folder / "adapter_config.json", (folder / "adapter_model.safetensors").read_bytes()
    record = json.loads(path.read_text()) | values
    digest = adapter_digest(record, weights) if record["format_version"] >= 3 else hashlib.sha256(weights).hexdigest()
    path.write_text(json.dumps(record | {"sha256": digest}))


def as_written_by(version, folder, backbone):
    """The adapter as an earlier version wrote it: a hash of the tensors alone, a fingerprint of a sample of the weights."""
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text())
    record["backbone"] = {name: record["backbone"][name] for name in ("name", "family", "width")} | {"fingerprint": sample_fingerprint(backbone)}
    record["format_version"] = version
    if version == 1:
        record["config"] = {name: value for name, value in record["config"].items() if name not in FIRST_READING}
    path.write_text(json.dumps(record))
    seal(folder)


@pytest.fixture(params=list(MODELS))
def backbone(request):
    """A tiny backbone of every supported architecture."""
    return tiny_backbone(request.param)
