"""How long DVC takes to answer: `python bench/everyday.py`, in a clone whose default grid has been run and committed.

Every command is given on one core, three times after one to warm up; the table shows the median. Of a command that runs stages,
the seconds that those say they took are taken off: what is left is DVC's own.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "status",
    "dag",
    "metrics show",
    "metrics diff",
    "plots show",
    "params diff",
    "data status",
    "diff",
    "exp show",
    "repro --dry",
    "repro tasks/sst2/dvc.yaml",
    "repro",
)
EXPERIMENT = "exp run -f -n everyday -S training.steps={steps} tasks/sst2/dvc.yaml"


def seconds(command):
    "Wall time of a command of DVC, and the part that its stages say is theirs."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"dvc {command} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return took, sum(float(s) for s in re.findall(r"(?m)^(?:train|evaluate|reference|prepare|report)[ :].*?([\d.]+) s, see", done.stdout))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", action="store_true", help="time `dvc exp run` too; it leaves its results in the workspace")
    parser.add_argument("--name", default="this-machine", help="of the file in bench/results/everyday")
    chosen = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for command in COMMANDS:
        found[f"dvc {command}"] = statistics.median([seconds(command)[0] for _ in range(4)][1:])
        print(f"{found[f'dvc {command}']:5.1f} s  dvc {command}", flush=True)
    if chosen.experiment:
        own = [took - stages for took, stages in (seconds(EXPERIMENT.format(steps=steps)) for steps in (3, 4, 5))]
        found["dvc exp run -S training.steps=... tasks/sst2/dvc.yaml, without its stages"] = statistics.median(own)
        print(f"{statistics.median(own):5.1f} s  dvc exp run -S, without its stages")
    file = ROOT / "bench" / "results" / "everyday" / f"{chosen.name}.json"
    file.write_text(json.dumps({"processor": platform.processor() or platform.machine(), "seconds": {k: round(v, 2) for k, v in found.items()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
