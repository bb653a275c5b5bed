"""What surrounds a run's training, on the embedded profile: `python bench/overhead.py`, after `make reproduce`.

One training stage is run again by plain `dvc repro`, in a fresh process: DVC, the interpreter and its imports, papermill, loading
rows and backbone, validation, writing. Printed is that time without the seconds of training themselves, which the run's own
measurement holds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="cb")
    parser.add_argument("--method", default="ept")
    parser.add_argument("--times", type=int, default=5)
    chosen = parser.parse_args()
    cost = ROOT / "runs" / "costs" / f"{chosen.task}-{chosen.method}-0.json"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "-q", "-f", "--single-item", f"tasks/{chosen.task}/dvc.yaml:train@{chosen.method}-0"]
    lock = ROOT / "tasks" / chosen.task / "dvc.lock"
    kept, found = lock.read_text(), []
    for _ in range(chosen.times):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall, training = time.perf_counter() - start, json.loads(cost.read_text())["train_seconds"]
        found.append(wall - training)
        print(f"{wall:.1f} s in all, {training:.1f} s of training, {found[-1]:.1f} s around it", flush=True)
    lock.write_text(kept)  # nothing has changed but a time
    print(f"median: {statistics.median(found):.1f} s around the training")


if __name__ == "__main__":
    main()
