"""What it is worth to serve many tasks from one process: `python bench/serving.py`, or `--help`.

Requests of N tasks wait, each to be answered with the log-probabilities of two labels. Three ways answer the same requests, in turn,
round after round, and each round gives the ratios of their times:

    processes   a process for each task, with a backbone and a prompt of its own; all work at the same time
    models      one process, one backbone, a model for each task: batches of one task, one after another
    bank        one process, one backbone, a `PromptBank`: batches of all tasks

All use the same cores. Memory is what each way has by itself, after answering, with pages that its processes share counted once (PSS).
Nothing is downloaded: the backbone has a real shape and random weights, the texts are random tokens, in the lengths of real tasks.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from show import keep, replace_part

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "bench" / "README.md"
WAYS = ("processes", "models", "bank")
METHODS = ("ept", "pt", "dept")  # in turn, so that prompts differ in length
SIZES = {"smollm2": dict(prompt_length=100, short_length=40, max_length=256), "tiny": dict(prompt_length=60, short_length=6, max_length=256)}


# ---- a process that answers ---------------------------------------------------------------------------------------------


def load(job):
    "The folded prompts of some tasks on one backbone, by task number, with random numbers as training might leave them."
    import torch

    from ept import build_method, load_backbone

    torch.set_num_threads(job["threads"])
    backbone, models = load_backbone(job["folder"], precision=job["precision"]).model, {}
    for task in job["tasks"]:
        torch.manual_seed(task)
        model = build_method(METHODS[task % len(METHODS)], backbone, seed=task, **SIZES[job["shape"]])
        with torch.no_grad():
            for parameter in model.prompt.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        models[task] = model.fold()
    return backbone, models


def labels(task):
    "Two labels of a task, one token each."
    return [[11 + 2 * task], [12 + 2 * task]]


def answer_by_models(models, requests):
    "Each task's requests in batches of their own."
    from ept.training.ranking import rank_labels

    scores = {}
    for task, model in models.items():
        numbers = [n for n, (whose, _) in enumerate(requests) if whose == task]
        if numbers:
            scores |= dict(zip(numbers, rank_labels(model, [requests[n][1] for n in numbers], labels(task)).tolist()))
    return [scores[n] for n in range(len(requests))]


def answer_by_bank(bank, requests):
    "All requests in batches of similar length."
    import torch

    from ept.training.ranking import batches_by_length, pad

    scores, candidates = {}, {str(task): labels(task) for task, _ in requests}
    for batch in batches_by_length([len(text) for _, text in requests]):
        texts = [requests[n][1] for n in batch]
        ids, mask = pad(texts, 0), pad([[1] * len(text) for text in texts], 0)
        found = bank.score([str(requests[n][0]) for n in batch], ids, mask, candidates)
        scores |= dict(zip(batch, found.to(torch.float64).tolist()))
    return [scores[n] for n in range(len(requests))]


def work(job):
    "Answer lines of requests until there are no more."
    backbone, models = load(job)
    if job["way"] == "bank":
        from ept.model.bank import PromptBank

        bank = PromptBank(backbone, {str(task): model for task, model in models.items()})
        models.clear()
    print("ready", flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        scores = answer_by_bank(bank, requests) if job["way"] == "bank" else answer_by_models(models, requests)
        print(json.dumps(scores), flush=True)


# ---- the three ways -----------------------------------------------------------------------------------------------------


class Server:
    "One way to answer: a process for each task, or one for all."

    def __init__(self, way, tasks, cores, **job):
        groups = [[task] for task in range(tasks)] if way == "processes" else [list(range(tasks))]
        threads = max(1, cores // len(groups))
        self.groups = groups
        command = lambda group: [sys.executable, __file__, "--work", json.dumps({"way": way, "tasks": group, "threads": threads, **job})]
        self.processes = [subprocess.Popen(command(group), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for group in groups]
        for process in self.processes:
            if process.stdout.readline() != "ready\n":
                self.stop()
                raise SystemExit(f"a process of {way!r} did not start; its message is above")

    def answer(self, requests):
        "The scores of all requests, and the seconds until the last of them."
        shares = [[n for n, (task, _) in enumerate(requests) if task in group] for group in self.groups]
        lines = [json.dumps([requests[n] for n in share]) + "\n" for share in shares]
        begin = time.perf_counter()
        for process, line in zip(self.processes, lines):
            process.stdin.write(line)
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes]
        seconds = time.perf_counter() - begin
        scores = {n: score for share, answer in zip(shares, answers) for n, score in zip(share, json.loads(answer))}
        return [scores[n] for n in range(len(requests))], seconds

    def memory(self):
        "Bytes of all its processes, shared pages once."
        rollup = lambda process: Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        pss = lambda text: next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return 1024 * sum(pss(rollup(process)) for process in self.processes)

    def stop(self):
        for process in self.processes:
            process.stdin.close()
            process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def draw(waiting, tasks, seed, vocabulary):
    "Requests that wait: task numbers, each as often as any other, and texts in the lengths of real tasks."
    counts = json.loads((ROOT / "bench" / "lengths.json").read_text())["question"]
    chance, known = random.Random(seed), list(counts)
    length = lambda task: int(chance.choices(list(counts[known[task % len(known)]]), list(counts[known[task % len(known)]].values()))[0])
    numbers = [n % tasks for n in range(waiting)]
    chance.shuffle(numbers)
    return [(task, [chance.randrange(10, vocabulary) for _ in range(length(task))]) for task in numbers]


def middle(values):
    "Median and quartiles."
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def measure(options, folder):
    "Memory of each way by itself, then seconds of each round, all ways in turn."
    job = dict(folder=folder, shape=options.shape, precision=options.precision)
    vocabulary, memory = {"smollm2": 49152, "tiny": 320}[options.shape], {}
    rounds = lambda waiting, number: draw(waiting, options.tasks, 1000 * waiting + number, vocabulary)
    for way in WAYS:
        with Server(way, options.tasks, options.cores, **job) as server:
            server.answer(rounds(max(options.waiting), 0))
            memory[way] = server.memory()
        print(f"{way}: {memory[way] / 2**30:.2f} GiB", flush=True)
    seconds, farthest = {waiting: {way: [] for way in WAYS} for waiting in options.waiting}, 0.0
    with ExitStack() as stack:
        servers = {way: stack.enter_context(Server(way, options.tasks, options.cores, **job)) for way in WAYS}
        for number in range(options.rounds + 1):  # the first one warms up
            for waiting in options.waiting:
                requests, answers = rounds(waiting, number), {}
                for way in random.Random(number).sample(WAYS, len(WAYS)):
                    answers[way], took = servers[way].answer(requests)
                    if number:
                        seconds[waiting][way].append(took)
                farthest = max(farthest, *(abs(a - b) for way in WAYS for one, other in zip(answers[way], answers["models"]) for a, b in zip(one, other)))
                print(f"round {number}, {waiting} waiting: { ({way: round(times[-1], 3) for way, times in seconds[waiting].items() if times}) }", flush=True)
    return {"memory_bytes": memory, "largest_difference": farthest, "waiting": {str(w): summary(w, seconds[w]) for w in options.waiting}}


def summary(waiting, seconds):
    "Requests a second of each way, and its ratio to processes, from the rounds one by one."
    return {
        way: {
            "requests_per_second": middle([waiting / s for s in times]),
            "times_processes": middle([base / s for base, s in zip(seconds["processes"], times)]),
        }
        for way, times in seconds.items()
    }


# ---- the page -----------------------------------------------------------------------------------------------------------


def show(result):
    "A result as Markdown."
    setting, machine = result["setting"], result["machine"]
    alone = "" if setting["alone"] else " Other work ran on the same machine: ratios are of rounds side by side, the rates mean nothing."
    where = f"{setting['cores']} cores of {machine['processor']['name']}, PyTorch {machine['torch']}"
    lines = [
        f"Measured on {result['date']}: {where}; {setting['tasks']} tasks on the {setting['shape']} shape, precision {setting['precision']}, {setting['rounds']} rounds.{alone}",
        "",
        "| requests that wait | " + " | ".join(f"`{way}`, requests a second" for way in WAYS) + " | `models` to `processes` | `bank` to `processes` |",
        "|---:|" + "---:|" * (len(WAYS) + 2),
    ]
    for waiting, ways in result["waiting"].items():
        rates = [f"{ways[way]['requests_per_second']['median']:.1f}" for way in WAYS]
        ratios = ["{median:.2f} ({low:.2f} to {high:.2f})".format(**ways[way]["times_processes"]) for way in WAYS[1:]]
        lines.append(f"| {waiting} | " + " | ".join(rates + ratios) + " |")
    memory = result["memory_bytes"]
    lines += ["", "Memory: " + ", ".join(f"`{way}` {memory[way] / 2**30:.2f} GiB ({memory[way] / memory['processes']:.2f})" for way in WAYS) + "."]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SIZES, default="smollm2", help="of the backbone")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="number format of the backbone")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--waiting", type=int, nargs="+", default=[4, 16, 64], help="how many requests wait at a time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of each way, over all its processes")
    parser.add_argument("--name", default="this-machine", help="of the file in bench/results/serving")
    parser.add_argument("--shared", action="store_true", help="say on the page that other work ran at the same time")
    parser.add_argument("--show", type=Path, help="measure nothing, put this result into bench/README.md")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(json.loads(options.work))
    if options.show:
        return replace_part(PAGE, "serving", show(json.loads(options.show.read_text())))
    import torch

    from bench import processor
    from contender import backbone

    with tempfile.TemporaryDirectory() as folder:
        backbone({"shape": options.shape, "folder": folder})
        found = measure(options, folder)
    setting = {name: getattr(options, name) for name in ("shape", "precision", "tasks", "rounds", "cores")} | {"alone": not options.shared}
    result = {"date": str(date.today()), "machine": {"processor": processor(), "torch": torch.__version__}, "setting": setting, **found}
    return keep(result, ROOT / "bench" / "results" / "serving" / f"{options.name}.json", "serving", show(result))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
