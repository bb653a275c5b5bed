"""What has to be true after a grid was disturbed: the same results as undisturbed, no stage at its end twice without cause, and
nothing left over. Each check answers with sentences about what is wrong; none is a pass.
"""

import hashlib
import json
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from ept.workflow.workers import Setup
from tests.letters import below

# What differs from time to time, and is no result: seconds, executed notebooks, what stages have printed, the times in journals of trials.
VOLATILE = re.compile(r"(runs/(notebooks|costs|logs)/.*|runs/search/.*\.journal|(.*/)?dvc\.lock)")
KEPT = re.compile(r"\.dvc/(tmp/(lock|rwlock|rwlock\.lock|btime|coordinator|(stages|locks)/.*)|cache/.*)|runs/logs(/jobs/.*)?")  # kept from command to command
CACHES = {".git", "__pycache__"}
HOLDERS = {"coordinator", "worker", "fork server", "job"}  # with one of them goes what a stage has done and nobody has recorded
END = re.compile(r": \d+\.\d s, see ")  # what a stage prints last


def names(root):
    """Every file, socket and empty folder below a folder, by its path from there."""
    found = set()
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in CACHES]
        here = Path(folder).relative_to(root)
        found |= {str(here / name) for name in files} | ({str(here)} if not inside and not files else set())
    return found


def results(root):
    """Path -> hash of every file that the stages have made; of the locks, stage -> what is recorded of it."""
    made = (name for name in names(root) if name.startswith(("runs/", "results/")) and not VOLATILE.fullmatch(name))
    hashes = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in made if (root / name).is_file()}
    locked = {}
    for file in sorted(root.rglob("dvc.lock")):
        for stage, entry in entries_of(file).items():
            outs = [{"path": out["path"]} if VOLATILE.fullmatch(out["path"]) else out for out in entry["outs"]]
            locked[f"{file.relative_to(root)}:{stage}"] = json.dumps(entry | {"outs": outs}, sort_keys=True)
    return hashes | locked


def entries_of(lock):
    """Stage -> its entry in a lock file; `ValueError` for a file that was cut, as far as that can be seen."""
    try:
        found = yaml.safe_load(lock.read_text())
        entries = found["stages"].values()
        if lock.read_text().endswith("\n") and all(entry["cmd"] and all(out["path"] and out["md5"] for out in entry["outs"]) for entry in entries):
            return found["stages"]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{lock.name} of {lock.parent.name} is cut: {lock.stat().st_size} bytes")


def differences(
    expected,  # results of an undisturbed run
    found,  # results of another
):
    """What is missing, other, or nobody's."""
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    other = [f"{name} is not what an undisturbed run makes" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    return [*missing, *other, *(f"{name} is made by no undisturbed run" for name in sorted(found.keys() - expected.keys()))]


def repeated(
    journal,  # its lines: of the coordinator, and `TIME killed VICTIM` of who kills
    ends,  # stage -> how often it has said that it is at its end
):
    """Stages that began anew after their end was recorded, or were at their end more often than kills explain."""
    begun, recorded, causes, wrong = set(), Counter(), Counter(), []
    for line in journal:
        _, what, rest = line.split(maxsplit=2)
        stage = rest.split()[0].rstrip(":")
        if what == "killed":
            causes.update(begun if rest.strip() in HOLDERS else ())
        elif what == "begins":
            begun.add(stage)
            wrong += [f"{stage} began anew after its end was recorded"] if recorded[stage] else []
        else:
            begun.discard(stage)
            recorded[stage] += what == "ended"
    wrong += [f"{stage} was recorded {times} times" for stage, times in recorded.items() if times > 1]
    return wrong + [f"{stage} was at its end {times} times, and {causes[stage]} kills explain that" for stage, times in ends.items() if times > 1 + causes[stage]]


def strange_failures(
    journal,
    excused,  # pattern of reasons that the campaign itself has given
):
    """Attempts that have failed for a reason of their own."""
    return [line.split(maxsplit=1)[1] for line in journal if line.split()[1] == "failed" and not re.search(excused, line)]


def ends_of(root, stages):
    """Stage -> how often its log says that it was at its end."""
    logs = {stage: Setup(str(root / "runs" / "logs"), "").log_of(stage) for stage in stages}
    return {stage: len(END.findall(log.read_text(errors="replace"))) for stage, log in logs.items() if log.exists()}


def journal_of(root):
    """Lines of the journal of the stages."""
    file = root / "runs" / "logs" / "stages.log"
    return file.read_text().splitlines() if file.exists() else []


def left_over(
    root,  # a grid whose last command has ended
    expected,  # names that an undisturbed run leaves
    scratch,  # folder for temporary files, which was empty
):
    """Processes, entries of locks, files, sockets and folders that nobody needs."""
    processes = [f"{process} lives on" for process in living(root)]
    there = {name for name in names(root) - expected if not KEPT.fullmatch(name)} | {f"{scratch.name}/{name}" for name in names(scratch) - {"."}}
    return [*processes, *held(root), *(f"{name} was left" for name in sorted(there))]


def living(folder):
    """Processes that work in a folder, in words."""
    found = []
    for process in below(folder):
        with suppress(psutil.Error):  # ended meanwhile
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} ({' '.join(process.cmdline())[:80]})")
    return found


def held(root):
    """Entries of DVC's lock of files: of commands that are gone, when none is at work."""
    file = root / ".dvc" / "tmp" / "rwlock"
    try:
        entries = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        return ["rwlock is cut"]
    return [f"{path} is still held to {how}" for how, paths in entries.items() for path in paths]
