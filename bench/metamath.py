"""Run a method of this library by the rules of PEFT's method comparison: trained on MetaMathQA, tested on GSM8K.

    python bench/metamath.py ept/llama-3.2-3B --parameters default_training_params.json
    python bench/metamath.py pt/llama-3.2-3B-lr_0.01 --sizes '{"prompt_length": 200, "short_length": 200}' --rates '{"prompt": 0.01}'

The rules are those of https://github.com/huggingface/peft, folder method_comparison/MetaMathQA: its parameter files are read as they are (later
files override earlier ones; without any, its defaults hold), its rows in its order, its schedule, its count of right answers, and the result
has its schema, so that it can stand beside its tables. What is ours is said in the result, under "deviations". Rows and model come from the
hub; with --rows, from a folder that holds metamath.jsonl (query, response), gsm8k-train.jsonl and gsm8k-test.jsonl (question, answer).
"""

import argparse
import datetime
import json
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import get_cosine_schedule_with_warmup

from ept import Backbone, EPTModel, Task, TrainingConfig, build_method, load_backbone
from ept.data.encoding import Encoder
from ept.training.batching import collate
from ept.training.config import RATES
from ept.training.generation import write_answers
from ept.training.trainer import optimizer_groups
from ept.utils.checking import from_dict, unknown
from ept.utils.files import write_json
from ept.utils.reading import read_json, read_text

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 1300  # letters of query and response; longer rows of MetaMathQA are left out
VALIDATION = 50  # rows of GSM8K's training set
BUCKET = 20  # batches among which rows are sorted by length
WARM_UP = 0.1  # share of the steps
MARKERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
DEVIATIONS = (
    "the loss is that of the answers alone, for the offset of a prompt belongs to the questions; there it is that of question and answer",
    "a space stands between the question's end and the answer; there none does",
    "a question of more tokens than max_length of the sizes is cut",
    "prompts are evaluated folded",
)


@dataclass(frozen=True)
class Parameters:
    "The parameters of a run, by their names in PEFT's comparison, with its defaults."

    model_id: str = "meta-llama/Llama-3.2-3B"
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    compile: bool = False
    use_gc: bool = False
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, float] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1})
    lr_scheduler: str | None = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: dict[str, int] = field(default_factory=lambda: {"max_length": 800, "max_new_tokens": 300})
    attn_implementation: str | None = None
    init_kv_cache_prefix: str | None = None

    def __post_init__(self):
        only = {
            "dtype": ("bfloat16", "float32"),
            "compile": (False,),
            "use_gc": (False,),
            "optimizer_type": ("AdamW",),
            "lr_scheduler": ("cosine",),
            "use_amp": (False,),
            "attn_implementation": (None,),
            "init_kv_cache_prefix": (None,),
        }
        for name, allowed in only.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; this script runs {' or '.join(map(repr, allowed))} alone")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"eval_steps is {self.eval_steps}; it must be at most max_steps, which is {self.max_steps}")


def read_parameters(files):
    "The parameters that files of PEFT's comparison give, the later ones before the earlier ones."
    values = {}
    for file in files:
        values |= read_json(file, "give a default_training_params.json or training_params.json of PEFT's comparison")
    return from_dict(Parameters, values)


def read_rows(folder=None):
    "The rows of training, validation and test as (query, response), in the order of the comparison."
    if folder:
        names = ("metamath.jsonl", "gsm8k-train.jsonl", "gsm8k-test.jsonl")
        metamath, known, test = ([json.loads(line) for line in read_text(Path(folder) / name).split("\n") if line.strip()] for name in names)
    else:
        metamath, gsm8k = load_dataset("meta-math/MetaMathQA")["train"], load_dataset("openai/gsm8k", "main")
        known, test = gsm8k["train"], gsm8k["test"]
    train = [(row["query"], row["response"]) for row in metamath]
    known, test = ([(row["question"], row["answer"]) for row in rows] for rows in (known, test))
    order = np.random.RandomState(0).permutation(len(known))[:VALIDATION]
    return {"train": [pair for pair in train if len(" ".join(pair)) <= LONGEST], "validation": [known[i] for i in order], "test": test}


def final_answer(text):
    "What stands behind the last sign of an answer, a number where it is one; None where there is no such sign."
    text = text.strip().rstrip(".!?")
    marker = next((marker for marker in MARKERS if marker in text), None)
    if marker is None:
        return None
    found = text.rpartition(marker)[2].strip().split("\n")[0].strip(" .!?$%")
    try:
        return float(Fraction(re.sub(r"\s*/\s*", "/", found)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return found


def accuracy(answers, responses):
    "The share of answers whose final one is that of the response, from 0 to 1."
    right = [final_answer(response) for response in responses]
    if None in right:
        raise ValueError(f"a response has no final answer: {responses[right.index(None)]!r:.200}; it must end in one of {MARKERS}")
    return sum(final_answer(answer) == known for answer, known in zip(answers, right)) / len(right)


def batches(lengths, size, steps):
    "Indices of the rows of each step: in their order, sorted within buckets, the longest first; from the start again where they end."
    rounds = []
    while len(rounds) < steps:
        for start in range(0, len(lengths), BUCKET * size):
            bucket = sorted(range(start, min(start + BUCKET * size, len(lengths))), key=lambda i: -lengths[i])
            rounds += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return rounds[:steps]


class Memory:
    "Bytes that an accelerator has reserved and in use, noted at every step; None on a processor without one."

    def __init__(self, device):
        self.cuda, self.reserved, self.allocated = device.type == "cuda", [], []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.max_memory_reserved(device)

    def note(self):
        if self.cuda:
            self.reserved.append(torch.cuda.memory_reserved() - self.start)
            self.allocated.append(torch.cuda.memory_allocated() - self.start)

    def mean(self, values, last=None):
        return sum(values[-(last or len(values)) :]) / len(values[-(last or len(values)) :]) if values else None

    def describe(self):
        return {
            "accelerator_memory_reserved_avg": int(self.mean(self.reserved)) if self.cuda else None,
            "accelerator_memory_max": torch.cuda.max_memory_reserved() - self.start if self.cuda else None,
            "accelerator_memory_reserved_99th": int(np.percentile(self.reserved, 99)) if self.cuda else None,
        }


@dataclass
class Comparison:
    "A model, its rows as token ids, and what is noted while it trains."

    parameters: Parameters
    backbone: Backbone
    model: EPTModel
    rows: dict
    training: TrainingConfig
    metrics: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    durations: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    evaluation_seconds: float = 0.0

    def __post_init__(self):
        p = self.parameters
        task = Task("metamath", ("query",), generation=True, question=p.query_template, answer_tokens=p.max_seq_length)
        make = lambda new: Encoder(replace(task, answer_tokens=new), self.backbone.tokenizer, "question", self.model.prompt_config.max_length)
        self.encoder, self.writer = make(p.max_seq_length), make(p.generation_kwargs["max_new_tokens"])
        self.memory = Memory(self.backbone.model.device)

    def features(self):
        "Question and answer of as many training rows as there are steps for."
        pairs = self.rows["train"][: self.parameters.max_steps * self.parameters.batch_size]
        texts = self.encoder.encode([{"query": query} for query, _ in pairs])
        room = self.parameters.max_seq_length
        return [(text, target[: room - len(text)]) for text, target in zip(texts, self.encoder.targets([response for _, response in pairs]))]

    def evaluate(self, split):
        "The share of right answers to the questions of a split."
        started = time.perf_counter()
        model = self.model if self.model.adaptation or self.model.reads_text else self.model.fold()
        texts = self.writer.encode([{"query": query} for query, _ in self.rows[split]])
        room = self.parameters.batch_size_eval * (max(map(len, texts)) + self.writer.task.answer_tokens)
        found = accuracy(write_answers(model, self.writer, texts, tokens=room), [response for _, response in self.rows[split]])
        self.evaluation_seconds += time.perf_counter() - started
        return found, time.perf_counter() - started

    def train(self):
        "All steps, with a validation every so many."
        p, features, started = self.parameters, self.features(), time.perf_counter()
        self.model.prompt.cover(max(len(text) for text, _ in features))
        optimizer = torch.optim.AdamW(optimizer_groups(self.model, self.training))
        schedule = get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * p.max_steps), p.max_steps)
        trained = [q for q in self.model.parameters() if q.requires_grad]
        for step, batch in enumerate(batches([len(t) + len(a) for t, a in features], p.batch_size, p.max_steps), 1):
            tic = time.perf_counter()
            self.model.train()
            rows = collate(*map(list, zip(*(features[i] for i in batch))), self.backbone.family, self.backbone.tokenizer.pad_token_id)
            loss = self.model(**{name: tensor.to(self.backbone.model.device) for name, tensor in rows.items()}, only_labelled=True).loss
            optimizer.zero_grad()
            loss.backward()
            if p.grad_norm_clip:
                torch.nn.utils.clip_grad_norm_(trained, p.grad_norm_clip)
            optimizer.step()
            schedule.step()
            self.losses.append(loss.item())
            self.memory.note()
            self.tokens.append(sum(len(text) + len(answer) for text, answer in (features[i] for i in batch)))
            self.durations.append(time.perf_counter() - tic)
            if step % p.eval_steps == 0:
                self.note(step, started)
        self.close(step)

    def note(self, step, started):
        "What the comparison's tables say of a validation."
        last = self.parameters.eval_steps
        found, seconds = self.evaluate("validation")
        self.metrics.append(
            {
                "step": step,
                "valid accuracy": found,
                "train loss": sum(self.losses[-last:]) / last,
                "train samples": step * self.parameters.batch_size,
                "train time": sum(self.durations[-last:]),
                "eval time": seconds,
                "tokens / sec": sum(self.tokens[-last:]) / sum(self.durations[-last:]),
                "mem allocated avg": self.memory.mean(self.memory.allocated, last),
                "mem reserved avg": self.memory.mean(self.memory.reserved, last),
                "elapsed time": time.perf_counter() - started,
            }
        )
        print(f"step {step}: validation {found:.3f}, loss {self.metrics[-1]['train loss']:.4f}", file=sys.stderr)

    def close(self, step):
        "The test, of the prompt as it is at the last step."
        last = self.losses[-self.parameters.eval_steps :]
        found, _ = self.evaluate("test")
        samples = step * self.parameters.batch_size
        self.metrics.append(
            {
                "step": step,
                "test accuracy": found,
                "train loss": sum(last) / len(last),
                "train samples": samples,
                "train total tokens": sum(self.tokens),
                "forgetting": None,
            }
        )


def file_size(model):
    "Bytes of the saved adapter's numbers."
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in model.save_pretrained(Path(folder) / "adapter").glob("*.safetensors"))


def about(backbone):
    "The machine and the packages, in the comparison's words."
    packages = {f"{name}-version": version(name) for name in ("transformers", "datasets", "torch")} | {"ept-version": version("ept-prompt-tuning")}
    accelerator = torch.cuda.get_device_name(0) if backbone.model.device.type == "cuda" else str(backbone.model.device)
    names = ("system", "release", "version", "machine", "processor")
    return {
        "model_info": {"sha": backbone.revision, "created_at": None},
        "dataset_info": {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")},
        "package_info": packages,
        "system_info": {name: getattr(platform, name)() for name in names} | {"accelerator": accelerator},
        "pytorch_info": torch.__config__.show(),
    }


def run(name, parameters, rows, backbone, sizes=None, rates=None):
    "Train and test the method that stands before the slash of an experiment's name; the result, in the comparison's schema."
    began, created, method = time.perf_counter(), datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(), name.split("/")[0]
    for group in rates or {}:
        if group not in RATES:
            raise unknown("rate", group, RATES)
    torch.manual_seed(parameters.seed)
    common = dict.fromkeys(RATES.values(), parameters.optimizer_kwargs["lr"]) | {RATES[group]: rate for group, rate in (rates or {}).items()}
    training = TrainingConfig(steps=parameters.max_steps, weight_decay=parameters.optimizer_kwargs.get("weight_decay", 0.0), **common)
    model = build_method(method, backbone.model, backbone.tokenizer, **{"seed": parameters.seed, **(sizes or {})})
    comparison, error = Comparison(parameters, backbone, model, rows, training), ""
    started = time.perf_counter()
    try:
        comparison.train()
    except torch.OutOfMemoryError as problem:
        error = str(problem)
    train_time = time.perf_counter() - started - comparison.evaluation_seconds
    config = {"peft_type": method.upper().replace("-", "_"), "rates": common, **asdict(model.prompt_config), **(asdict(model.extra) if model.extra else {})}
    trainable, total = model.num_trainable_parameters(), sum(p.numel() for p in model.parameters())
    return {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - began,
            "experiment_name": name,
            "peft_branch": None,
            "train_config": asdict(parameters),
            "peft_config": config,
            "error_msg": error,
            "deviations": list(DEVIATIONS),
        },
        "train_info": comparison.memory.describe()
        | {
            "train_time": train_time,
            "file_size": file_size(model),
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": "canceled" if error else "success",
            "metrics": comparison.metrics,
        },
        "meta_info": about(backbone),
    }


def save(result: dict[str, Any], folder):
    "Write a result under the name that the comparison would give it."
    return write_json(Path(folder) / f"{result['run_info']['experiment_name'].replace('/', '--')}.json", result)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="METHOD/NAME, such as ept/llama-3.2-3B")
    parser.add_argument("--parameters", nargs="*", default=[], metavar="FILE", help="parameter files of the comparison, the later ones override")
    parser.add_argument("--sizes", type=json.loads, default={}, help="of the method, as JSON; seed is that of the parameters")
    parser.add_argument("--rates", type=json.loads, default={}, help=f"learning rates by group ({', '.join(RATES)}), as JSON; the others take lr of optimizer_kwargs")
    parser.add_argument("--rows", metavar="FOLDER", help="local rows in place of the hub's")
    parser.add_argument("--output", default=str(ROOT / "runs" / "metamath"), metavar="FOLDER")
    given = parser.parse_args(arguments)
    if not re.fullmatch(r"[^/]+/[^/]+", given.experiment):
        parser.error(f"the experiment is {given.experiment!r}; call it METHOD/NAME")
    parameters = read_parameters(given.parameters)
    backbone = load_backbone(parameters.model_id, precision=parameters.dtype)
    result = run(given.experiment, parameters, read_rows(given.rows), backbone, given.sizes, given.rates)
    save(result, given.output)
    print(f"{given.experiment}: test accuracy {result['train_info']['metrics'][-1].get('test accuracy')}, {given.output}")


if __name__ == "__main__":
    main()
