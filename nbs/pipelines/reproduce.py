"""Bring a profile's results up to date: `python nbs/pipelines/reproduce.py --profile smollm2 --jobs 2`.

`dvc repro` in the profile's folder does the same, one stage after another. Here the runs are dealt out to several processes, each
with an explicit list of stages (`--single-item`: DVC locks what a stage writes, and two processes that both look after the
backbone would collide), waiting for each other's lock on the repository. Where a job has failed, an ordinary `dvc repro` goes
over everything once more. What the stages print goes to runs/logs; on the terminal is a line for each finished run.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DVC = [sys.executable, "-m", "dvc"]
ROUNDS = ("sources", "shared", "searches", "runs")  # see `targets`; they name the jobs and their logs


def targets(profile):
    """Names of the stages: those that come first, then four rounds of blocks that may run side by side.

    The first round makes the prompts from which other runs start, the second what these share, the third searches, a block for each
    method; each is empty where there is nothing to do. In the last a block is a task and a method, training and evaluation for each
    seed, or a run of the sweep. Each block comes with a number: dealt out by it, every job gets a method on as many tasks as the
    others, so that no job has all the slow ones.
    """
    from layout import searches

    grid = profile.grid
    file = lambda task: f"tasks/{task}/dvc.yaml"

    def block(task, method):
        if method in grid.references:
            return [f"{file(task)}:reference@{method}-{seed}" for seed in grid.seeds]
        kind = "-transfer" if method in grid.transfer else ""
        return [f"{file(task)}:{stage}{kind}@{method}-{seed}" for seed in grid.seeds for stage in ("train", "evaluate")]

    plans = profile.source_plans()
    sources = [(i, [f"dvc.yaml:source@{plan.task}-{plan.seed}"]) for i, plan in enumerate(plans) if plan.method == "pt"]
    shared = [(i, [f"dvc.yaml:shared@{plan.seed}"]) for i, plan in enumerate(plans) if plan.method != "pt"]
    tried = [(f"dvc.yaml:search{suffix}@{method}", method) for suffix, methods in searches(profile).items() for method in methods]
    likes = lambda method: [f"dvc.yaml:search-like@{other}" for other, name in profile.search.like.items() if name == method]
    search = [(i, [stage, *likes(method)]) for i, (stage, method) in enumerate(tried)]
    runs = [(i + j, block(task, method)) for i, task in enumerate(grid.tasks) for j, method in enumerate(grid.methods)]
    sweep = [(i, [f"dvc.yaml:sweep@{run.task}-{run.size}-{run.seed}"]) for i, run in enumerate(profile.sweep_runs())]
    return ["dvc.yaml:backbone", *(f"{file(task)}:prepare" for task in profile.prepared)], (sources, shared, search, [*runs, *sweep])


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


def run_grid(profile, jobs, environment, progress):
    "Bring the grid up to date with some jobs at a time; the exit status."
    folder, (first, rounds) = profile.file.parent, targets(profile)
    jobs = max(1, min(jobs, len(rounds[-1])))
    (folder / "runs" / "logs").mkdir(parents=True, exist_ok=True)

    def start(name, *words):
        command = [*DVC, "--wait-for-lock", "repro", *words]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
        return process, progress.watch(name, process.stdout, folder / "runs" / "logs" / f"{name}.log")

    def run(*commands):
        started = [start(*command) for command in commands]
        try:
            failed = [process.wait() for process, _ in started]
            for _, thread in started:
                thread.join()
            return any(failed)
        except KeyboardInterrupt:
            for process, _ in started:
                process.terminate()
                process.wait()
            raise

    if run(("plan", "--single-item", "plan")):
        return 1
    with warm(environment) as address:
        environment |= {"EPT_WARM": address} if address else {}
        failed = run(("prepare", "--single-item", *first))
        for number, blocks in enumerate(() if failed else rounds):
            shares = [sum((stages for i, stages in blocks if i % jobs == job), []) for job in range(jobs)]
            failed = failed or run(*((f"{ROUNDS[number]}-{job + 1}", "--single-item", *stages) for job, stages in enumerate(shares) if stages))
        if not failed and not run(("report", "--single-item", "report")):
            return 0
    progress.say("a job has failed; an ordinary pass finishes the rest")
    return int(run(("repro",)))


def tracked(name):
    "The file by which DVC knows a folder of the repository, or one around it; None where there is none."
    files = [f"{path}.dvc" for path in (Path(name), *Path(name).parents)]
    return next((file for file in files if (ROOT / file).is_file()), None)


def main(arguments=None):
    "Command line; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from ept.grid.profiles import load_profile, profile_files
    from ept.utils.checking import unknown
    from layout import write_layout
    from progress import Progress

    files = profile_files(ROOT)
    parser.add_argument("--profile", default=next(iter(files)), help=f"one of: {', '.join(files)} (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs of the grid at a time")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.profile not in files:
            raise unknown("profile", chosen.profile, files)
        profile = load_profile(files[chosen.profile])
        write_layout(profile)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    missing = [name for name in (profile.data.folder, profile.backbone.folder, profile.backbone.update) if name and not (ROOT / name).exists()]
    if strange := [name for name in missing if not tracked(name)]:
        print(f"error: {os.path.relpath(profile.file)} names the folder {strange[0]!r}, and there is none in the repository; bring it there, or mend the name", file=sys.stderr)
        return 1
    if missing and (failed := subprocess.run([*DVC, "pull", "-q"], cwd=ROOT, env=environment).returncode):  # a few megabytes, from the clone's own store
        return failed
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this process ends its jobs
    with Progress(profile) as progress:
        try:
            status = run_grid(profile, chosen.jobs, environment, progress)
        except KeyboardInterrupt:
            progress.say("stopped; the same command goes on from here")
            return 130
        progress.conclude(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
