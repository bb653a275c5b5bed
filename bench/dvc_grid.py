"""What DVC itself costs for a grid of trivial commands: `python bench/dvc_grid.py`, 13 tasks x 12 methods x 3 seeds.

A repository is made in a temporary folder in the layout of this one (a dvc.yaml for each task), every
stage's command is an `echo`, and one `dvc repro` runs it. `--flat` puts all stages into one file, to compare.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

MATRIX = {"method": "${grid.methods}", "seed": "${grid.seeds}"}


def stages(task, matrix, wdir):
    "Training and evaluation as in tasks/<task>/dvc.yaml, but for what they do."
    key = f"{task}-${{item.method}}-${{item.seed}}"
    trained, scored = f"runs/adapters/{key}", f"results/scores/{key}"
    common = {"matrix": matrix, "wdir": wdir}
    return {
        "train": {**common, "cmd": f"echo {key} > {trained}", "deps": ["code"], "outs": [{trained: {"cache": False}}]},
        "evaluate": {**common, "cmd": f"cp {trained} {scored}", "deps": [trained], "outs": [{scored: {"cache": False}}]},
    }


def make(root, tasks, methods, seeds, flat):
    "The repository."
    for folder in ("runs/adapters", "results/scores"):
        (root / folder).mkdir(parents=True)
    (root / "code").write_text("code\n")
    grid = {"tasks": tasks, "methods": methods, "seeds": seeds}
    (root / "params.yaml").write_text(yaml.safe_dump({"grid": grid}))
    report = {"cmd": "ls results/scores | wc -l > report", "deps": ["results/scores"], "outs": [{"report": {"cache": False}}]}
    own = stages("${item.task}", {"task": "${grid.tasks}", **MATRIX}, ".") if flat else {}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {**own, "report": report}}))
    if not flat:
        for task in tasks:
            (root / "tasks" / task).mkdir(parents=True)
            (root / "tasks" / task / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["../../params.yaml"], "stages": stages(task, MATRIX, "../..")}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=13)
    parser.add_argument("--methods", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flat", action="store_true", help="all stages in one file: minutes")
    chosen = parser.parse_args()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dvc = lambda *words: subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, env=environment, check=True)
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        dvc("init", "-q")
        dvc("config", "core.analytics", "false")
        make(root, *([f"{kind}{i}" for i in range(n)] for kind, n in (("t", chosen.tasks), ("m", chosen.methods), ("s", chosen.seeds))), chosen.flat)
        for again in ("everything", "nothing left to do"):
            start = time.perf_counter()
            dvc("repro", "-q")
            seconds = time.perf_counter() - start
            runs = int((root / "report").read_text())
            print(f"{2 * runs} stages and a report, {'one file' if chosen.flat else 'a file for each task'}, {again}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
