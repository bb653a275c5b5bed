"""One measurement in a process of its own: `python bench/contender.py '{"contender": "ept", "shape": "t5-base", ...}'`.

Prints one line of JSON. Imports are inside functions, so that the start-up of a contender holds what it needs and nothing else.
"""

import contextlib
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = {"t5-base": 32128, "smollm2": 49152, "tiny": 320, "thin": 320}
T5_SHAPES = {
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "tiny": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "thin": {"d_model": 24, "d_kv": 2, "d_ff": 24, "num_layers": 12, "num_heads": 12},  # as deep as T5-base: a step is launched, and little computed
}


def peak_bytes():
    "Most memory of this process since the last `forget_peak`: of the GPU where there is one."
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    "Let the peak start again from what is held now, where the system can do that."
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def texts(vocabulary, lengths, seed=0):
    "Random token ids of given lengths; the answer is one token (and the end, for an encoder-decoder model)."
    chance = random.Random(seed)
    draw = lambda n: [chance.randrange(10, vocabulary) for _ in range(n)]
    return [(draw(n), draw(1)) for n in lengths]


# ---- what other people run ----------------------------------------------------------------------------------------------


def peft_model(folder, tuned):
    "PEFT's prompt tuning with 100 tokens: as it comes, or with the switches a good user sets."
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"dtype": torch.bfloat16} if tuned and half_precision() else {}
    if tuned and hasattr(config, "dropout_rate"):
        config.dropout_rate = 0.0  # Trainer calls train(): the only documented way to a backbone without dropout
    auto, kind = (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM") if config.is_encoder_decoder else (AutoModelForCausalLM, "CAUSAL_LM")
    model = auto.from_pretrained(folder, config=config, trust_remote_code=False, use_safetensors=True, **options)
    return get_peft_model(model, PromptTuningConfig(task_type=kind, num_virtual_tokens=100, prompt_tuning_init=PromptTuningInit.RANDOM))


def peft_collate(decoder_only):
    "Pads a batch to its longest member."
    import torch

    def pad(rows, value):
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    def collate(examples):
        rows = [e["input_ids"] for e in examples]
        return {"input_ids": pad(rows, 0), "attention_mask": pad([[1] * len(r) for r in rows], 0), "labels": pad([e["labels"] for e in examples], -100)}

    return collate


def peft_features(pairs, decoder_only):
    "Examples as a Trainer's user would store them."
    if decoder_only:
        return [{"input_ids": text + answer, "labels": [-100] * len(text) + answer} for text, answer in pairs]
    return [{"input_ids": text, "labels": [*answer, 1]} for text, answer in pairs]


def peft_trainer(model, pairs, batch_size, steps, tuned, decoder_only, folder, callbacks, shuffle):
    "transformers' Trainer, unchanged."
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):  # fixed batches for fixed lengths; otherwise Trainer's own order
        def _get_train_sampler(self, *_, **__):
            return None

    options = {"train_sampling_strategy": "group_by_length"} if tuned and shuffle else {}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=0.3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    kind = Trainer if shuffle else InOrder
    features = Dataset.from_list(peft_features(pairs, decoder_only))
    return kind(model, arguments, train_dataset=features, data_collator=peft_collate(decoder_only), callbacks=callbacks)


# ---- ours ---------------------------------------------------------------------------------------------------------------


def our_model(folder, method, precision):
    "A method of ours on the backbone."
    from ept import build_method, load_backbone

    backbone = load_backbone(folder, precision=precision)
    return build_method(method, backbone.model, prompt_length=100, short_length=40, max_length=256)


def our_trainer(model, pairs, batch_size, steps, folder, callbacks, shuffle):
    "The engine of `ept.train`, without a task around it."
    from transformers import TrainingArguments

    from ept.training.batching import collate, plan_batches
    from ept.training.trainer import PromptTrainer

    end = [] if model.family == "decoder-only" else [1]
    features = [(text, answer + end) for text, answer in pairs]
    lengths = [len(text) for text, _ in features]
    plan = plan_batches(lengths, batch_size, steps, 0) if shuffle else [list(range(i * batch_size, (i + 1) * batch_size)) for i in range(steps)]
    groups = [{"params": list(g.values()), "lr": 0.3 if name == "prompt" else 1e-3} for name, g in model.parameter_groups().items() if g]
    arguments = TrainingArguments(output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, report_to="none", save_strategy="no", disable_tqdm=True)
    return PromptTrainer(model, plan, features, lambda pairs: collate(*map(list, zip(*pairs)), model.family, 0), None, groups, args=arguments, callbacks=callbacks)


# ---- measuring ----------------------------------------------------------------------------------------------------------


def half_precision():
    "Whether the machine has instructions for products in bfloat16."
    from ept.model.backbone import has_bfloat16, resolve_device

    return has_bfloat16(resolve_device())


def synchronise():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(now=time.perf_counter):
    "A Trainer callback that keeps the seconds of every step, as `now` counts them."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.last = [], None

        def on_step_begin(self, *_, **__):
            synchronise()
            self.last = now()

        def on_step_end(self, *_, **__):
            synchronise()
            self.seconds.append(now() - self.last)

    return Clock()


def build(job):
    "The model of a contender and a function that makes its trainer."
    folder, name, decoder_only = job["folder"], job["contender"], job["shape"] == "smollm2"
    if name.startswith("peft"):
        tuned = name == "peft-pt-tuned"
        model = peft_model(folder, tuned)
        return model, lambda *a, shuffle=False: peft_trainer(model, *a[:3], tuned, decoder_only, *a[3:], shuffle)
    method, _, precision = name.partition("@")
    model = our_model(folder, method, precision or "auto")
    return model, lambda *a, shuffle=False: our_trainer(model, *a, shuffle)


def train(job):
    "Seconds a step at each length, peak memory, floating-point operations of a step."
    _, make = build(job)
    found, ready = {}, time.perf_counter() - STARTED
    forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        for length in job["lengths"]:
            timer, steps = clock(), job["warm_up"] + job["steps"]
            pairs = texts(VOCABULARY[job["shape"]], [length] * job["batch_size"] * steps)
            make(pairs, job["batch_size"], steps, folder, [timer]).train()
            found[length] = timer.seconds[job["warm_up"] :]
    return {"start_seconds": ready, "step_seconds": found, "peak_bytes": peak_bytes()}


def stream(job):
    "Seconds of a run over texts of realistic lengths, in the batches that the contender itself forms."
    _, make = build(job)
    timer = clock()
    pairs = texts(VOCABULARY[job["shape"]], job["lengths"])
    with tempfile.TemporaryDirectory() as folder:
        warm = texts(VOCABULARY[job["shape"]], [16] * job["batch_size"])
        make(warm, job["batch_size"], 1, folder, []).train()
        make(pairs, job["batch_size"], len(pairs) // job["batch_size"], folder, [timer], shuffle=True).train()
    return {"seconds": sum(timer.seconds), "examples": len(pairs) // job["batch_size"] * job["batch_size"]}


def infer(job):
    "Seconds to score a batch at each length."
    import torch

    model, _ = build(job)
    if job.get("folded"):
        model = model.fold()
    model.eval()
    decoder_only, found = job["shape"] == "smollm2", {}
    for length in job["lengths"]:
        pairs = texts(VOCABULARY[job["shape"]], [length] * job["batch_size"])
        ids = torch.tensor([text for text, _ in pairs], device=model.device if hasattr(model, "device") else model.backbone.device)
        mask, seconds = torch.ones_like(ids), []
        start = {} if decoder_only else {"decoder_input_ids": torch.zeros_like(ids[:, :1])}
        for _ in range(job["warm_up"] + job["steps"]):
            synchronise()
            begin = time.perf_counter()
            with torch.no_grad():
                if job["contender"].startswith("peft"):
                    model(input_ids=ids, attention_mask=mask, **start).logits[:, -1].log_softmax(-1)
                else:
                    model.score(input_ids=ids, attention_mask=mask, candidates=[[11], [12]])
            synchronise()
            seconds.append(time.perf_counter() - begin)
        found[length] = seconds[job["warm_up"] :]
    return {"score_seconds": found}


def prompt(job):
    "Seconds to compute the prompt and the offset alone, forward and backward: what a step has besides the backbone."
    model, _ = build(job)
    seconds = []
    for _ in range(20 * (job["warm_up"] + job["steps"])):
        synchronise()
        begin = time.perf_counter()
        sum(part.square().sum() for part in model.prompt() if part is not None).backward()
        synchronise()
        seconds.append(time.perf_counter() - begin)
        model.zero_grad()
    return {"prompt_seconds": seconds[20 * job["warm_up"] :]}


def operations(job):
    "Floating-point operations of one training step, counted by PyTorch."
    from torch.utils.flop_counter import FlopCounterMode

    model, make = build(job)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in job["lengths"]:
            pairs = texts(VOCABULARY[job["shape"]], [length] * job["batch_size"])
            trainer = make(pairs, job["batch_size"], 1, folder, [])
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            with FlopCounterMode(display=False) as counter:
                trainer.compute_loss(model.train(), batch).backward()
            found[length] = counter.get_total_flops()
    return {"operations": found}


def launch(job):
    "Processor seconds of training steps on one short text: where next to nothing is computed, what it takes to say what is to be computed."
    import torch

    torch.set_num_threads(1)
    _, make = build(job)
    timer, steps = clock(time.process_time), job["warm_up"] + job["steps"]
    with tempfile.TemporaryDirectory() as folder:
        make(texts(VOCABULARY[job["shape"]], [8] * steps), 1, steps, folder, [timer]).train()
    return {"launch_seconds": timer.seconds[job["warm_up"] :]}


def machine(job):
    "What this machine is, and how fast it multiplies matrices."
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates, size = {}, 8192 if device == "cuda" else 2048
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(job["steps"]):
            synchronise()
            begin = time.perf_counter()
            a @ b
            synchronise()
            seconds.append(time.perf_counter() - begin)
        rates[name] = 2 * size**3 / statistics.median(seconds[1:])
    return {"rates": rates, "threads": torch.get_num_threads(), "torch": torch.__version__, "device": device}


def backbone(job):
    "Write a backbone of a real shape with random weights."
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size, vocabulary = job["shape"], VOCABULARY[job["shape"]]
    if size == "smollm2":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=8192,
                rope_theta=100000.0,
                tie_word_embeddings=True,
                pad_token_id=0,
            )
        )
    else:
        model = T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **T5_SHAPES[size]))
    model.save_pretrained(job["folder"])
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(job["folder"])
    return {"parameters": model.num_parameters()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    job = json.loads(sys.argv[1])
    measure = {f.__name__: f for f in (train, stream, infer, prompt, operations, launch, machine, backbone)}[job["measure"]]
    answer = measure(job)
    print("\n" + json.dumps(answer | {"process_seconds": time.perf_counter() - STARTED}))
