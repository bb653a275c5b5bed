"""Bring a profile's results up to date: `python nbs/pipelines/reproduce.py --profile embedded --jobs 2`.

`dvc repro` does the same, one stage after another. Here the runs are dealt out to several processes, each with an explicit
list of stages (`--single-item`: DVC locks what a stage writes, and two processes that both look after the backbone would
collide), waiting for each other's lock on the repository. A single item also spares DVC reading the stages of all
profiles, which takes it ten seconds. Where a job has failed, an ordinary `dvc repro` goes over everything once more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


def profiles():
    "Parameter files by the name of their profile."
    return {"embedded": ROOT / "params.yaml"} | {p.parent.name: p for p in sorted(ROOT.glob("profiles/*/params.yaml"))}


def targets(profile):
    """Names of the stages: those that make rows, then three rounds of blocks that may run side by side.

    A block is a task and a method: its search, then training and evaluation for each seed. The first round makes the prompts
    from which other runs start; it is empty where none do. The last is the sweep, at learning rates that the second round has
    searched. Each block comes with a number: dealt out by it, every job gets a method on as many tasks as the others, so that
    no job has all the slow ones.
    """
    grid = profile.grid
    file = lambda task: f"{profile.here}tasks/{task}/dvc.yaml"

    def block(task, method):
        kind = "-transfer" if method in grid.transfer else ""
        runs = [f"{stage}{kind}@{method}-{seed}" for seed in grid.seeds for stage in ("train", "evaluate")]
        return [f"{file(task)}:{stage}" for stage in (f"search{kind}@{method}", *runs)]

    sources = grid.sources if grid.transfer else ()
    keep = lambda task: [f"{profile.here}dvc.yaml:source@{task}-{seed}" for seed in grid.seeds]
    first = [(i, block(task, "pt") + keep(task)) for i, task in enumerate(sources)]
    pairs = [(i + j, task, method) for i, task in enumerate(grid.tasks) for j, method in enumerate(grid.methods)]
    rest = [(i, block(task, method)) for i, task, method in pairs if not (method == "pt" and task in sources)]
    sweep = [(i, [f"{profile.here}dvc.yaml:sweep@{run.task}-{run.size}-{run.seed}"]) for i, run in enumerate(profile.sweep_runs())]
    return [f"{file(task)}:prepare" for task in grid.tasks], (first, rest, sweep)


@contextmanager
def warm(environment):
    "Keep a process with the big libraries imported while the grid runs; its address, or None where the system cannot do that."
    if not hasattr(os, "fork"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ept-") as folder:
        address = str(Path(folder) / "warm")
        command = [sys.executable, str(Path(__file__).with_name("warm.py")), address]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as process:
            try:
                yield address
            finally:
                process.stdin.close()


def main(arguments=None):
    "Command line; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="embedded", help=f"one of: {', '.join(profiles())}")
    parser.add_argument("--jobs", type=int, default=2, help="runs of the grid at a time; 1 is plain `dvc repro`")
    chosen = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from ept.profiles import load_profile
    from ept.settings import unknown

    try:
        if chosen.profile not in profiles():
            raise unknown("profile", chosen.profile, profiles())
        profile = load_profile(profiles()[chosen.profile])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    dvc = lambda *words: subprocess.run([*DVC, *words], cwd=ROOT, env=environment).returncode

    if profile.data.source == "embedded" and not (ROOT / profile.data.depends).exists():
        if failed := dvc("pull", "-q", f"{profile.data.depends}.dvc"):
            return failed
    status = run_grid(chosen.jobs, profile, environment, dvc)
    report = f"results/{profile.profile}/report/report.html"
    print(f"\nlook at {report}" if not status else "\nnot everything is up to date, see above; run the command again to go on", flush=True)
    return status


def run_grid(jobs, profile, environment, dvc):
    "Bring the grid up to date with some jobs at a time; the exit status."
    file, (rows, rounds) = f"{profile.here}dvc.yaml", targets(profile)
    jobs = max(1, min(jobs, len(rounds[1])))
    if jobs == 1:
        return dvc("repro", file)
    if failed := dvc("repro", "--single-item", f"{file}:backbone"):
        return failed
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"EPT_THREADS": threads, "OMP_NUM_THREADS": threads, **environment}
    with warm(environment) as address:
        environment |= {"EPT_WARM": address} if address else {}
        start = lambda stages: subprocess.Popen([*DVC, "repro", "--single-item", *stages], cwd=ROOT, env=environment)
        failed = start(rows).wait()
        for blocks in () if failed else rounds:
            shares = [sum((stages for i, stages in blocks if i % jobs == job), []) for job in range(jobs)]
            failed = failed or any([process.wait() for process in [start(stages) for stages in shares if stages]])
        if not failed and not start([f"{file}:report"]).wait():
            return 0
    print("a job has failed, see above; an ordinary pass finishes the rest:", file=sys.stderr, flush=True)
    return dvc("repro", file)


if __name__ == "__main__":
    sys.exit(main())
