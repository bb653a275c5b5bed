"""What a gate that reads the text costs: `ept-text-gate` beside `ept` and `dept`, a training step and the scoring of a batch.

Its prompt differs from text to text, so it cannot be folded, and a decoder-only backbone cannot compute it once for the whole batch.
Every measurement is a process of its own; contenders take turns, and ratios are of medians of the same round.
"""

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

from bench import FOLDER, ROOT, call, measure_rounds, processor, spread
from show import keep, replace_part, table

CONTENDERS = ["dept", "ept", "ept-text-gate"]
PAGE, RESULTS = ROOT / "bench" / "README.md", ROOT / "bench" / "results" / "text-gate"


def measure(shape, options, say):
    "Seconds of a training step and of scoring a batch, and their ratios to `ept`, by contender and length."
    folder = FOLDER / shape
    if not (folder / "config.json").exists():
        call("backbone", shape=shape, folder=str(folder))
    job = {"shape": shape, "folder": str(folder), "batch_size": options.batch_size, "steps": options.steps, "warm_up": 1, "lengths": options.lengths}
    kinds = {"train": "step_seconds", "infer": "score_seconds"}
    return {kind: compare(measure_rounds(kind, CONTENDERS, options.rounds, say, **job), key) for kind, key in kinds.items()}


def compare(answers, key):
    "The spread over rounds of the seconds and of the ratio to `ept` in the same round, by contender and length."
    rounds = {name: [{length: statistics.median(seconds) for length, seconds in answer[key].items()} for answer in found] for name, found in answers.items()}
    ratios = lambda found, length: [one[length] / ept[length] for one, ept in zip(found, rounds["ept"], strict=True)]
    spreads = lambda found, length: {"seconds": spread([one[length] for one in found]), "to_ept": spread(ratios(found, length))}
    return {name: {length: spreads(found, length) for length in found[0]} for name, found in rounds.items()}


def show(found):
    "What was found, as Markdown."
    said = lambda cell: [f"{cell['seconds']['median']:.2f} s", f"{cell['to_ept']['median']:.2f} ({cell['to_ept']['low']:.2f} to {cell['to_ept']['high']:.2f})"]
    rows = [
        [shape, f"`{name}`", length, *said(cells["train"][name][length]), *said(cells["infer"][name][length])]
        for shape, cells in found["shapes"].items()
        for name in CONTENDERS
        for length in cells["train"][name]
    ]
    head = ["shape", "method", "tokens of a text", "training step", "to `ept`", "scoring a batch", "to `ept`"]
    machine = f"{found['threads']} threads of {found['processor']['name']}, PyTorch {found['torch']}"
    return f"Measured on {found['date']}: {machine}; batches of {found['batch_size']}, {found['rounds']} rounds.\n\n{table(head, rows)}\n"


def main():
    "All measurements, one after another."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["t5-base", "smollm2"], choices=["t5-base", "smollm2", "tiny"])
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps at each length in a process, after one that is not (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens of a text (default: 32 128)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--name", default="this-machine", help="of the file in bench/results/text-gate")
    parser.add_argument("--show", type=Path, help="measure nothing, put this result into bench/README.md")
    options = parser.parse_args()
    if options.show:
        return replace_part(PAGE, "text gate", show(json.loads(options.show.read_text())))
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = call("machine", steps=2)
    found = {"date": str(date.today()), "processor": processor(), **{name: machine[name] for name in ("threads", "torch")}}
    found |= {"batch_size": options.batch_size, "rounds": options.rounds, "shapes": {}}
    for shape in options.shapes:
        found["shapes"][shape] = measure(shape, options, lambda text: print(text, file=sys.stderr, flush=True))
    return keep(found, RESULTS / f"{options.name}.json", "text gate", show(found))


if __name__ == "__main__":
    main()
