"""Bring a profile's results up to date: `python nbs/pipelines/reproduce.py --profile smollm2-plain`.

`dvc repro` in the profile's folder does the same, one stage after another. Here the stages go to workers, as many at a time as the
section [cluster] of settings.ini says, on this machine or on others; see ept.workflow. What they print goes to runs/logs; on the
terminal is a line for each finished run.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from command import drop_damaged_bytecode, end_at_ctrl_c  # noqa: E402

if __name__ == "__main__":
    end_at_ctrl_c()  # before all that takes time
    drop_damaged_bytecode()

from dvc.exceptions import DvcException  # noqa: E402

from ept.grid.profiles import load_profile, profile_files  # noqa: E402
from ept.training.checkpoints import remove_ended  # noqa: E402
from ept.utils.checking import unknown  # noqa: E402
from ept.utils.files import sweep  # noqa: E402
from ept.utils.reading import read_json  # noqa: E402
from ept.utils.settings import load_settings  # noqa: E402
from ept.workflow.clusters import BATCH, Cluster  # noqa: E402
from ept.workflow.progress import Progress, duration  # noqa: E402
from ept.workflow.scheduling import reproduce  # noqa: E402
from ept.workflow.stages import Stages, keep_others_away, only_coordinator  # noqa: E402
from ept.workflow.workers import Setup  # noqa: E402
from layout import write_layout  # noqa: E402

AROUND = 2.0  # seconds of a stage beside its training
LAST = ("evaluate", "reference", "sweep")  # the stages that end a run


# ---- what is said about the runs ----------------------------------------------------------------------------------------


class Runs:
    "The runs of a profile, as its stages make them."

    def __init__(self, profile):
        self.folder = profile.file.parent
        self.runs = {run.key: run for run in (*profile.runs(), *profile.sweep_runs())}
        self.swept = {f"{run.task}-{run.size}-{run.seed}": run.key for run in profile.sweep_runs()}  # as their stages are called

    def key_of(self, stage, kinds):
        "The run to which a stage belongs, if it is of one of these kinds; None for others."
        found = re.fullmatch(r"(?:tasks/([\w.-]+)/dvc\.yaml:)?(\w+)(?:-transfer)?@([\w.-]+)", stage)
        if not found or found[2] not in kinds:
            return None
        return self.swept.get(found[3]) if found[2] == "sweep" else f"{found[1]}-{found[3]}"

    def describe(self, stage, made):
        "What a search or a run has found, when its last stage has ended; None for other stages, and for what was up to date before."
        if stage.startswith("search") and stage in made:
            return self._found(stage.partition("@")[2])
        key = self.key_of(stage, LAST)
        took = sum(seconds for other, seconds in made.items() if self.key_of(other, ("train", *LAST)) == key)
        record = self.folder / "results" / "scores" / f"{key}.json"
        if key not in self.runs or not took or not record.exists():
            return None
        values, size = read_json(record, "remove it"), self.runs[key].size
        return f"{values['method']} {values['task']}{f' {size}' if size else ''} {values['score']:.1f} (majority {values['majority_score']:.1f}) {took:.0f} s"

    def _found(self, method):
        "What the search of a method has chosen."
        record = read_json(self.folder / "results" / "search" / f"{method}.json", "remove it")
        chosen = ", ".join(f"{name} {value}" for name, value in record["chosen"].items())
        return f"search {method}: {len(record['trials'])} trials, the best {record['trials'][record['best'] - 1]['score']:.1f} with {chosen}"

    def expected(self):
        "Seconds that a stage will take: what this training took last time, or those of its method, or all, in the mean."
        file, took, like = self.folder / "results" / "costs.csv", {}, defaultdict(list)  # seconds of a run; of those of a method, under None of all
        for row in csv.DictReader(file.read_text().splitlines()) if file.exists() else ():
            if row["train_seconds"]:  # blank where it was not timed
                took["-".join(filter(None, (row["task"], row["method"], row["seed"], row["size"])))] = seconds = float(row["train_seconds"])
                for name in (row["method"], None):
                    like[name].append(seconds)

        def seconds_of(stage):
            if not (key := self.key_of(stage, ("train", "sweep"))):
                return AROUND
            return AROUND + (took.get(key) or mean(like[self.runs[key].method] or like[None] or [AROUND]))

        return seconds_of

    def committed(self):
        "How many scores equal those of the last commit, and how many there are to compare with."
        files = [self.folder / "results" / "scores" / f"{key}.json" for key in self.runs]
        old = [subprocess.run(["git", "show", f"HEAD:./results/scores/{file.name}"], cwd=self.folder, capture_output=True) for file in files]
        known = [(json.loads(was.stdout)["score"], read_json(file, "remove it")["score"]) for file, was in zip(files, old) if was.returncode == 0 and file.exists()]
        return sum(was == now for was, now in known), len(known)


# ---- the command --------------------------------------------------------------------------------------------------------


def tracked(name):
    "The file by which DVC knows a folder of the repository, or one around it; None where there is none."
    files = [f"{path}.dvc" for path in (Path(name), *Path(name).parents)]
    return next((file for file in files if (ROOT / file).is_file()), None)


def bring(profile):
    "Bring the folders that a profile names from the clone's own store, where they are not there; `FileNotFoundError` for one that DVC does not know."
    missing = [name for name in (profile.data.folder, profile.backbone.folder, profile.backbone.update) if name and not (ROOT / name).exists()]
    if strange := [name for name in missing if not tracked(name)]:
        raise FileNotFoundError(f"{os.path.relpath(profile.file)} names the folder {strange[0]!r}, and there is none in the repository; bring it there, or mend the name")
    if missing:
        subprocess.run([sys.executable, "-m", "dvc", "pull", "-q"], cwd=ROOT, check=True)


def tidy(folder):
    "Remove what killed processes have left in the making in a profile."
    for part in ("results", "runs", "tasks"):
        sweep(folder / part)


def say(text):
    "A line on the terminal, at once."
    print(text, flush=True)


def fetched(profile):
    "The stages that may need a network."
    return ("backbone", *(f"tasks/{task}/dvc.yaml:prepare" for task in profile.prepared))


def show(stages, cluster, allow_missing):
    "Print what would run, and how, without running it."
    names = stages.due(allow_missing)
    for name in names:
        print(name)
    print(f"{len(names)} of {len(stages)} stages would run; one that turns out as it was saves those that need it")
    if cluster.engine in BATCH:
        print(f"\non {cluster.workers} jobs of {cluster.engine}, each with this script:\n\n{cluster.job_script()}")


def conclude(summary, runs, took):
    "The last lines: what was done, how it compares with what is in git, and where to look; the exit status."
    if summary.stopped:
        print("stopped; the same command goes on from here")
        return 130
    if not summary.complete:
        print(f"not everything is up to date after {took}; the same command goes on from here")
        return 1
    ended = {runs.key_of(stage, ("train", *LAST)) for stage in summary.made} & runs.runs.keys()
    print(f"{len(ended)} runs made and {len(runs.runs) - len(ended)} found up to date in {took}")
    equal, known = runs.committed()
    if known:
        print(f"{equal} of {known} committed scores found again{'' if equal == known else '; another processor adds in another order, or computes in another precision'}")
    print(f"look at {os.path.relpath(runs.folder / 'results' / 'report' / 'report.html')}")
    return 0


def parser_of(profiles):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Where the stages run is said in the section [cluster] of settings.ini.")
    parser.add_argument("--profile", default=next(iter(profiles)), help=f"one of: {', '.join(profiles)} (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="stages at a time, in place of `workers` in settings.ini")
    parser.add_argument("--allow-missing", action="store_true", help="leave runs alone whose records hold, though their adapters are missing: to go on with a grid in a new clone")
    parser.add_argument("--fetch", action="store_true", help="only bring the rows and the backbone, on this machine: for a cluster whose nodes reach no network")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run, and on a cluster show the script of a job")
    return parser


def main(arguments=None):
    "Command line; the exit status."
    files, runs, start = profile_files(ROOT), None, time.monotonic()
    chosen = parser_of(files).parse_args(arguments)
    try:
        if chosen.profile not in files:
            raise unknown("profile", chosen.profile, files)
        profile = load_profile(files[chosen.profile])
        load_settings()
        changes = ({"workers": chosen.jobs} if chosen.jobs is not None else {}) | ({"engine": "local"} if chosen.fetch else {})
        cluster = Cluster.read(ROOT / "settings.ini", **changes)
        folder, runs = profile.file.parent, Runs(profile)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` in a stage is this one
        with only_coordinator(folder):
            tidy(folder)
            write_layout(profile)
            bring(profile)
            with keep_others_away(folder, say):
                setup = Setup(str(folder / "runs" / "logs"), str(folder / ".dvc" / "tmp" / "stages"), ("preload",), (str(ROOT), str(HERE)))
                if chosen.allow_missing and not chosen.dry_run:  # all stages need the plan, each a part of it: which of them differ can be said when it is there
                    plan = Stages(folder, ("plan",))
                    list(map(say, plan.mended))
                    if (summary := reproduce(plan, cluster, setup)).stopped:
                        return conclude(summary, runs, duration(time.monotonic() - start))
                stages = Stages(folder, fetched(profile) if chosen.fetch else ("dvc.yaml",))
                list(map(say, stages.mended))
                if chosen.dry_run:
                    show(stages, cluster, chosen.allow_missing)
                    return 0
                say(f"{len(runs.runs)} runs of profile {profile.profile}; what their stages print is in {os.path.relpath(folder / 'runs' / 'logs')}")
                watch = Progress(profile.profile, runs.describe, runs.expected(), journal=f"{setup.logs}/stages.log")
                summary = reproduce(stages, cluster, setup, watch, chosen.allow_missing)
            if summary.complete and not chosen.fetch:
                remove_ended(folder / "runs" / "checkpoints")
    except (ValueError, OSError, RuntimeError, DvcException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:  # DVC has said what was wrong
        return error.returncode
    if chosen.fetch and summary.complete:
        print("the rows and the backbone are there; the rest of the grid needs no network")
        return 0
    return conclude(summary, runs, duration(time.monotonic() - start))


if __name__ == "__main__":
    sys.exit(main())
