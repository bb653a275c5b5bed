"""Bring a profile's results up to date: `python nbs/pipelines/reproduce.py --profile embedded --jobs 2`.

`dvc repro` does the same, one stage after another. Here the tasks are shared out among several processes, each with an
explicit list of stages (`--single-item`: DVC locks what a stage writes, and two processes that both look after the backbone
would collide), waiting for each other's lock on the repository. An ordinary `dvc repro` at the end finishes what is left and
confirms that nothing is missing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


def profiles():
    "Parameter files by the name of their profile."
    return {"embedded": ROOT / "params.yaml"} | {p.parent.name: p for p in sorted(ROOT.glob("profiles/*/params.yaml"))}


def targets(file, tasks, values):
    "The stages of some tasks, in an order in which they can run."
    grid, stages = values["grid"], []
    for task in tasks:
        stages.append(f"{file}:prepare@{task}")
        for name in [f"{task}-{m}-{s}" for m in grid["methods"] for s in grid["seeds"]]:
            stages += [f"{file}:train@{name}", f"{file}:evaluate@{name}"]
    return stages


@contextmanager
def warm(environment):
    "Keep a process with the big libraries imported while the grid runs, where the system can do that."
    if not hasattr(os, "fork"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ept-") as folder:
        address = str(Path(folder) / "warm")
        command = [sys.executable, str(Path(__file__).with_name("warm.py")), address]
        with subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdin=subprocess.PIPE) as process:
            environment["EPT_WARM"] = address
            try:
                yield
            finally:
                del environment["EPT_WARM"]
                process.stdin.close()


def main(arguments=None):
    "Command line; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help=f"one of: {', '.join(profiles())}")
    parser.add_argument("--jobs", type=int, default=2, help="runs of the grid at a time; 1 is plain `dvc repro`")
    chosen = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from ept.settings import unknown

    if chosen.profile not in profiles():
        print(f"error: {unknown('profile', chosen.profile, profiles())}", file=sys.stderr)
        return 1
    values = yaml.safe_load(profiles()[chosen.profile].read_text())
    file = os.path.relpath(profiles()[chosen.profile].with_name("dvc.yaml"), ROOT)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    dvc = lambda *words: subprocess.run([*DVC, *words], cwd=ROOT, env=environment).returncode

    if values["data"]["source"] == "embedded" and not (ROOT / values["data"]["depends"]).exists():
        if failed := dvc("pull", "-q", f"{values['data']['depends']}.dvc"):
            return failed
    status = run_grid(chosen.jobs, values["grid"]["tasks"], values, file, environment, dvc)
    report = f"results/{values['profile']}/report/report.html"
    print(f"\nlook at {report}" if not status else "\nnot everything is up to date, see above; run the command again to go on", flush=True)
    return status


def run_grid(jobs, tasks, values, file, environment, dvc):
    "Bring the grid up to date with some jobs at a time; the exit status."
    jobs = max(1, min(jobs, len(tasks)))
    if jobs == 1:
        return dvc("repro", file)
    if failed := dvc("repro", f"{file}:backbone"):
        return failed
    environment.setdefault("EPT_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    environment.setdefault("OMP_NUM_THREADS", environment["EPT_THREADS"])
    with warm(environment):
        parts = [targets(file, tasks[i::jobs], values) for i in range(jobs)]
        running = [subprocess.Popen([*DVC, "repro", "--single-item", *part], cwd=ROOT, env=environment) for part in parts]
        if any([process.wait() for process in running]):
            print("a job has failed, see above; an ordinary pass finishes the rest:", file=sys.stderr, flush=True)
        return dvc("repro", file)


if __name__ == "__main__":
    sys.exit(main())
