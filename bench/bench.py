"""Measure what a step of training costs, side by side with PEFT: `make bench`, or `python bench/bench.py --help`.

Every contender runs in a process of its own, one at a time. A round goes once through all contenders; medians are over the
steps of all rounds. Nothing is downloaded: the backbones have the real shapes and random weights.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench"
BATCH = {"t5-base": 8, "smollm2": 16, "tiny": 4}
LENGTHS = [32, 128, 256]
TRAINED = ["peft-pt", "peft-pt-tuned", "pt", "dept", "ept", "ept@float32"]
SCORED = ["peft-pt", "peft-pt-tuned", "frozen", "pt", "dept", "ept"]  # dept and ept are folded
UNFOLDED = ("peft", "frozen", "ept-text-gate")  # what begins with these has no constants to fold into
STREAMED = ["peft-pt", "peft-pt-tuned", "pt", "ept"]
STREAM_TASKS, STREAM_EXAMPLES = ["sst2", "mrpc", "boolq"], 64


def call(measure, **job):
    "One measurement in a fresh process."
    command = [sys.executable, str(ROOT / "bench" / "contender.py"), json.dumps({"measure": measure, **job})]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{measure} {job.get('contender', '')} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values):
    "Median, first and third quartile, and how many."
    values = sorted(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def measure_rounds(measure, contenders, rounds, say, **job):
    "Each contender once a round; for each contender the answers of all rounds."
    answers = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders:
            folded = measure == "infer" and not name.startswith(UNFOLDED)
            answers[name].append(call(measure, contender=name, folded=folded, **job))
            say(f"{job['shape']}: {measure}, round {number + 1} of {rounds}, {name}: {answers[name][-1]['process_seconds']:.0f} s")
    return answers


def per_length(answers, key):
    "Spread over all steps of all rounds, by length."
    return {length: spread([s for a in answers for s in a[key][length]]) for length in answers[0][key]}


def sample(task, shape, examples, seed=0):
    "Lengths drawn from a task's counts."
    counts = json.loads((ROOT / "bench" / "lengths.json").read_text())["question" if shape == "smollm2" else "fields"][task]
    return random.Random(f"{task} {seed}").choices([int(n) for n in counts], list(counts.values()), k=examples)


def seconds_of(steps, length):
    "A step's seconds at any length, on the line between the measured lengths on both sides."
    known = sorted((int(n), s["median"]) for n, s in steps.items())
    left, right = next(((a, b) for a, b in itertools.pairwise(known) if length <= b[0]), known[-2:])
    return left[1] + (right[1] - left[1]) * (length - left[0]) / (right[0] - left[0])


def batches(contender, lengths, size):
    "The longest text of each batch that a contender forms."
    if contender == "peft-pt":  # Trainer's random order
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    else:  # by length: Trainer's groups hold 50 batches, ours 16
        chunk = (50 if contender.startswith("peft") else 16) * size
        parts = [sorted(lengths[i : i + chunk]) for i in range(0, len(lengths), chunk)]
        groups = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    longest = [max(g) for g in groups]
    return longest if contender.startswith("peft") else [-(-n // 8) * 8 for n in longest]


def per_task(contender, steps, shape, size):
    "Seconds of 1,000 examples of each task: its batches at the measured step times."
    tasks, count = json.loads((ROOT / "bench" / "lengths.json").read_text())["fields"], 1000 // size * size
    whole = lambda task: sum(seconds_of(steps, n) for n in batches(contender, sample(task, shape, count), size))
    return {task: whole(task) * 1000 / count for task in tasks}


def processor():
    "The processor's name and what it can do with bfloat16."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        find = lambda name: next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in find("flags").split()]
        return {"name": find("model name"), "flags": flags}
    except (OSError, StopIteration):
        return {"name": platform.processor() or platform.machine(), "flags": []}


def bench_shape(shape, options, say):
    "Everything about one backbone shape."
    folder, size = FOLDER / shape, options.batch_size or BATCH[shape]
    if not (folder / "config.json").exists():
        call("backbone", shape=shape, folder=str(folder))
    common = {"shape": shape, "folder": str(folder), "batch_size": size, "steps": options.steps, "warm_up": 1}
    lengths = options.lengths
    trained = measure_rounds("train", TRAINED, options.rounds, say, lengths=lengths, **common)
    prompts = measure_rounds("prompt", ["pt", "dept", "ept"], options.rounds, say, **common)
    scored = measure_rounds("infer", SCORED, options.rounds, say, lengths=lengths, **common)
    found = {"batch_size": size, "train": {}, "score": {}, "per_1000_examples": {}, "streams": {}}
    found["prompt_seconds"] = {name: spread([s for a in answers for s in a["prompt_seconds"]]) for name, answers in prompts.items()}
    for name, answers in trained.items():
        found["train"][name] = {
            "step_seconds": per_length(answers, "step_seconds"),
            "peak_bytes": spread([a["peak_bytes"] for a in answers]),
            "start_seconds": spread([a["start_seconds"] for a in answers]),
            "operations": call("operations", contender=name, **{**common, "lengths": lengths})["operations"],
        }
        found["per_1000_examples"][name] = per_task(name, found["train"][name]["step_seconds"], shape, size)
    for name, answers in scored.items():
        found["score"][name] = per_length(answers, "score_seconds")
    for task in [] if options.no_streams else STREAM_TASKS:
        drawn = sample(task, shape, STREAM_EXAMPLES, seed="stream")
        answers = measure_rounds("stream", STREAMED, 1, say, **{**common, "lengths": drawn})
        found["streams"][task] = {n: 1000 * a[0]["seconds"] / a[0]["examples"] for n, a in answers.items()}
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["t5-base", "smollm2"], choices=list(BATCH))
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender")
    parser.add_argument("--steps", type=int, default=3, help="timed steps at each length in a process, after one that is not")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a text")
    parser.add_argument("--batch-size", type=int, help="default: 8 for t5-base, 16 for smollm2")
    parser.add_argument("--quick", action="store_true", help="one round of two steps: a look, not a measurement")
    parser.add_argument("--no-streams", action="store_true", help="only the batches of fixed lengths")
    parser.add_argument("--name", default="this-machine", help="results go to bench/results/NAME.json; other shapes in it are kept")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps, options.no_streams = 1, 2, True
    if len(options.lengths) < 2:
        parser.error("--lengths needs at least two lengths: between them, step times are read off a line")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = ROOT / "bench" / "results" / f"{options.name}.json"
    kept = json.loads(file.read_text())["shapes"] if file.exists() else {}
    machine = call("machine", steps=20)
    rates = machine.pop("rates")
    machine.pop("process_seconds")
    result = {"date": str(date.today()), "machine": {**machine, "processor": processor()}, "shapes": kept}
    file.parent.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        result["shapes"][shape] = {"rates": rates, **bench_shape(shape, options, say)}
        file.write_text(json.dumps(result, indent=1) + "\n")
    from show import show

    print(show(file))


if __name__ == "__main__":
    main()
