"""What the coordinator of `make reproduce` costs, and how a grid of many stages scales: `make scaling`, or `python bench/scaling.py --help`.

A repository is made in a temporary folder in the layout of this one, a dvc.yaml for each task: training and evaluation for 13 tasks, 12
methods and 3 seeds, 936 stages, and a report that needs them all. First the stages do nothing, so that what is left is the coordinator's;
then each sleeps, and 1 to 64 of them run at a time: on threads of this machine, and on the workers of a Dask scheduler that runs already.
Every pass is a process of its own, whose CPU seconds are counted.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

import yaml

from bench import processor
from show import replace_part, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DVC = [sys.executable, "-m", "dvc"]
GRID = {"tasks": 13, "methods": 12, "seeds": 3}
EACH = 8  # stages at a time on one worker of Dask
WANTED = 90  # percent: the efficiency that was asked for


# ---- one pass, in a process of its own ----------------------------------------------------------------------------------


def one_pass(root, cluster):
    "Bring the project up to date once; what it took this process."
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    from ept.workflow.clusters import Cluster
    from ept.workflow.scheduling import reproduce
    from ept.workflow.stages import Stages, only_coordinator
    from ept.workflow.workers import Setup

    imported = time.perf_counter()
    with only_coordinator(root):
        stages = Stages(root)
        loaded = time.perf_counter()
        summary = reproduce(stages, Cluster(**cluster), Setup(f"{root}/logs", f"{root}/.dvc/tmp/stages"))
        ended = time.perf_counter()
    if not summary.complete:
        raise SystemExit(f"the grid is not complete: {summary}")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "import_seconds": imported - began,
        "load_seconds": loaded - imported,
        "pass_seconds": ended - loaded,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "made": len(summary.made),
    }


def measure(root, **cluster):
    "A pass over a project, from the start of Python to its end."
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--pass", str(root), json.dumps({"gpus": 0} | cluster)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a pass on {cluster} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - began}


# ---- projects -----------------------------------------------------------------------------------------------------------


def stages_of(task, matrix, wdir, work):
    "Training and evaluation as in tasks/<task>/dvc.yaml, but for what they do."
    key = f"{task}-${{item.method}}-${{item.seed}}"
    trained, scored = f"runs/adapters/{key}", f"results/scores/{key}"
    common = {"matrix": matrix, "wdir": wdir}
    return {
        "train": {**common, "cmd": f"{work}echo {key} > {trained}", "deps": ["code"], "outs": [{trained: {"cache": False}}]},
        "evaluate": {**common, "cmd": f"{work}cp {trained} {scored}", "deps": [trained], "outs": [{scored: {"cache": False}}]},
    }


def make(root, grid, flat=False, work=""):
    "A project of DVC; `flat` puts all stages into one file, `work` is what a stage does beside writing its output."
    tasks, methods, seeds = ([f"{name[0]}{i}" for i in range(number)] for name, number in grid.items())
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"], [*DVC, "config", "core.analytics", "false"]):
        subprocess.run(command, cwd=root, check=True)
    for folder in ("runs/adapters", "results/scores"):
        (root / folder).mkdir(parents=True)
    (root / "code").write_text("code\n")
    (root / "params.yaml").write_text(yaml.safe_dump({"grid": {"tasks": tasks, "methods": methods, "seeds": seeds}}))
    matrix = {"method": "${grid.methods}", "seed": "${grid.seeds}"}
    report = {"cmd": "ls results/scores | wc -l > report", "deps": ["results/scores"], "outs": [{"report": {"cache": False}}]}
    own = stages_of("${item.task}", {"task": "${grid.tasks}", **matrix}, ".", work) if flat else {}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {**own, "report": report}}))
    for task in [] if flat else tasks:
        (root / "tasks" / task).mkdir(parents=True)
        (root / "tasks" / task / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["../../params.yaml"], "stages": stages_of(task, matrix, "../..", work)}))


@contextmanager
def project(grid, flat=False, work=""):
    "The same, in a temporary folder."
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        make(Path(folder), grid, flat, work)
        yield Path(folder)


# ---- clusters -----------------------------------------------------------------------------------------------------------


@contextmanager
def dask_cluster(workers):
    "A scheduler of Dask and workers that take so many stages at a time; its address."
    from distributed import Client

    sizes = [min(EACH, workers - i) for i in range(0, workers, EACH)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    with ExitStack() as opened, tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/scheduler.json"

        def start(program, *options):
            command = [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", file, *options]
            process = opened.enter_context(subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            opened.callback(process.kill)

        start("dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard")
        for size in sizes:
            start("dask_worker", "--nthreads", str(size), "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--local-directory", folder)
        with Client(scheduler_file=file, timeout="60s") as client:
            client.wait_for_workers(len(sizes), timeout=120)
            address = client.scheduler.address
        yield address


@contextmanager
def workers_of(engine, workers):
    "The settings of a cluster that takes so many stages at a time."
    if engine == "local":
        yield {"workers": workers}
    else:
        with dask_cluster(workers) as address:
            yield {"engine": address, "workers": workers}


# ---- the measurement ----------------------------------------------------------------------------------------------------


def trivial(options, say):
    "Stages that do nothing, with two workers: each engine, one lock file for all in place of one for each task, and DVC alone."
    found = {}
    cases = [*((engine, False) for engine in options.engines), ("local", True)]
    for engine, flat in cases:
        with project(options.grid, flat) as root, workers_of(engine, 2) as cluster:
            name = f"{engine}, one file" if flat else engine
            found[name] = {"made": measure(root, **cluster), "again": measure(root, **cluster)}
            say(f"nothing to do in each, {name}: {found[name]['made']['seconds']:.0f} s, again {found[name]['again']['seconds']:.1f} s")
    with project(options.grid) as root:
        found["dvc repro"] = {}
        for which in ("made", "again"):
            began = time.perf_counter()
            subprocess.run([*DVC, "repro", "-q"], cwd=root, check=True, stdout=subprocess.DEVNULL)
            found["dvc repro"][which] = {"seconds": time.perf_counter() - began}
        say(f"nothing to do in each, dvc repro: {found['dvc repro']['made']['seconds']:.0f} s")
    return found


def sleeping(options, say):
    "Stages that sleep, by engine and number of workers."
    found = {engine: {} for engine in options.engines}
    for workers in options.workers:
        for engine in options.engines:
            with project(options.grid, work=f"sleep {options.sleep} && ") as root, workers_of(engine, workers) as cluster:
                found[engine][str(workers)] = took = measure(root, **cluster)
            say(f"{options.sleep} s in each, {engine}, {workers} at a time: {took['pass_seconds']:.1f} s, efficiency {100 * efficiency(took, options.sleep, workers):.0f} %")
    return found


def efficiency(took, sleep, workers):
    "The seconds that the stages slept, the report not counted, over those for which the workers were there."
    return (took["made"] - 1) * sleep / (workers * took["pass_seconds"])


def busy():
    "Other work on the machine: processes that ran or waited to in the last minute, for each core."
    return os.getloadavg()[0] / (os.cpu_count() or 1)


# ---- what is shown ------------------------------------------------------------------------------------------------------


def show(result):
    "The tables of a measurement, Markdown."
    machine, stages = result["machine"], result["stages"]
    said = f"Measured on {result['date']}: {machine['cores']} cores of {machine['processor']['name']}; load of other work before it {machine['busy']:.1f} for each core."
    rows = []
    for name, took in result["trivial"].items():
        made, again = took["made"], took["again"]
        cpu = f"{1000 * made['cpu_seconds'] / stages:.0f} ms" if "cpu_seconds" in made else ""
        rows.append([name, f"{made['seconds']:.1f} s", f"{1000 * made['seconds'] / stages:.0f} ms", cpu, f"{again['seconds']:.1f} s"])
    head = ["two workers", "whole", "for each stage", "CPU of the coordinator for each stage", "nothing to do"]
    parts = [said, f"{stages} stages that do nothing, from the start of Python to its end:", table(head, rows)]
    if result["sleeping"]:
        engines, sleep = list(result["sleeping"]), result["sleep"]
        rows = []
        for workers in sorted(result["sleeping"][engines[0]], key=int):
            cells = [workers, f"{-(-stages // int(workers)) * sleep:.0f} s"]
            for engine in engines:
                took = result["sleeping"][engine][workers]
                cells += [f"{took['pass_seconds']:.1f} s", f"{100 * efficiency(took, sleep, int(workers)):.0f} %", f"{1000 * took['cpu_seconds'] / stages:.0f} ms"]
            rows.append(cells)
        head = ["at a time", "no less than", *(f"{engine}{what}" for engine in engines for what in ("", ": efficiency", ": CPU for each stage"))]
        parts += [f"The same {stages} stages, when each sleeps for {sleep:g} s:", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def draw(result, file):
    "Seconds and efficiency by the number of workers, as SVG."
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    styles = dict(zip(result["sleeping"], (("#0072B2", "o", "threads of this machine"), ("#D55E00", "s", "workers of Dask"))))
    numbers = sorted(int(n) for n in next(iter(result["sleeping"].values())))
    left.plot(numbers, [result["stages"] * result["sleep"] / n for n in numbers], color="#999999", linestyle="--", label="the stages' own time")
    for engine, (colour, marker, label) in styles.items():
        took = result["sleeping"][engine]
        left.plot(numbers, [took[str(n)]["pass_seconds"] for n in numbers], color=colour, marker=marker, label=label)
        right.plot(numbers, [100 * efficiency(took[str(n)], result["sleep"], n) for n in numbers], color=colour, marker=marker, label=label)
    right.axhline(WANTED, color="#999999", linestyle="--")
    left.set(yscale="log", ylabel="seconds", title=f"{result['stages']} stages that sleep {result['sleep']:g} s")
    right.set(ylabel="efficiency, %", ylim=(0, 103), title="share of the workers' time in which stages slept")
    for panel in (left, right):
        panel.set(xscale="log", xlabel="stages at a time")
        panel.set_xticks(numbers, numbers)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def publish(file):
    "The tables into bench/README.md, and the figure beside the results."
    result, picture = json.loads(file.read_text()), ""
    if result["sleeping"]:
        draw(result, file.with_suffix(".svg"))
        picture = f"![seconds and efficiency by stages at a time](results/scaling/{file.stem}.svg)\n\n"
    replace_part(HERE / "README.md", "scaling", f"{picture}{show(result)}")
    print(show(result))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass", nargs=2, metavar=("FOLDER", "CLUSTER"), dest="one", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="this-machine", help="results go to bench/results/scaling/NAME.json, and into bench/README.md")
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds that a stage sleeps (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 64], help="stages at a time, those that sleep")
    parser.add_argument("--engines", nargs="+", choices=["local", "dask"], default=["local", "dask"])
    for name, number in GRID.items():
        parser.add_argument(f"--{name}", type=int, default=number, help="of the grid (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="measure nothing: tables and figure of the results that are there")
    options = parser.parse_args(arguments)
    if options.one:
        print("\n" + json.dumps(one_pass(options.one[0], json.loads(options.one[1]))))
        return
    file = HERE / "results" / "scaling" / f"{options.name}.json"
    if not options.show:
        options.grid = {name: getattr(options, name) for name in GRID}
        say = lambda text: print(text, file=sys.stderr, flush=True)
        machine = {"cores": os.cpu_count(), "processor": processor(), "busy": busy()}
        result = {"date": str(date.today()), "machine": machine, "sleep": options.sleep, "trivial": trivial(options, say)}
        result |= {"stages": result["trivial"][options.engines[0]]["made"]["made"], "sleeping": sleeping(options, say) if options.workers else {}}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    publish(file)


if __name__ == "__main__":
    main()
