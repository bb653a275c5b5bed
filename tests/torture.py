"""A campaign against the grid: `make torture`, or `python -m tests.torture --help`.

A miniature of the repository with stages of every kind is brought up to date by four workers while processes are killed at random:
stages, workers, what stages are forked from, jobs, the coordinator. Then the disk is full or read-only, or two commands are given at
once. In the end all is as it is where nobody disturbs; see aftermath.py. The moments are drawn from a seed; what runs at such a
moment is the machine's affair, so that a seed repeats the draws and not what they hit.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from show import replace_part
from tests import aftermath, slurm
from tests.engines import Dask, Local, OnSlurm, Skipped
from tests.grids import CLEANED, REPRODUCE, Grid, kind_of, left_in_peace, undisturbed
from tests.letters import below
from tests.miniature import ROOT

RESULT, PAGE = ROOT / "bench" / "torture.json", ROOT / "bench" / "README.md"
DVC = ("-m", "dvc")
STUCK = 300  # seconds after which a command that says nothing more hangs


# ---- kills --------------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What has become of a part of the campaign."""

    kills: dict[str, Counter] = field(default_factory=dict)  # victim -> kind of stage it was at -> how often
    cancelled: int = 0  # jobs, by scancel
    commands: int = 0  # that were given
    rounds: int = 0  # grids that were brought to their end
    problems: list[str] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)  # what only this part counts
    seconds: float = 0.0

    @property
    def total(self):
        """SIGKILLs."""
        return sum(sum(counts.values()) for counts in self.kills.values())

    def count(self, victim, kind):
        """One more."""
        if victim == "job":
            self.cancelled += 1
        else:
            self.kills.setdefault(victim, Counter())[kind] += 1


class Killer:
    """Draws, for each stage that begins, whether it is disturbed, when, and who is killed then."""

    def __init__(self, grid, engine, part, quota, seconds, draw, say):
        self.grid, self.engine, self.part, self.quota, self.seconds, self.draw, self.say = grid, engine, part, quota, seconds, draw, say
        self.seen, self.due = set(), []

    def begin(self, coordinator):
        """A command begins; one in eight is killed before its first stages."""
        self.coordinator, self.due = coordinator, []
        if self.draw.random() < 0.125:
            self.due.append((time.monotonic() + self.draw.uniform(0, 8), "coordinator", None, "no stage"))

    def tick(self):
        """Look at what runs, and kill what is due."""
        for pid, log in self.grid.stages_at_work().items():
            if pid not in self.seen:
                self.seen.add(pid)
                self.doom(pid, kind_of(log))
        now, due = time.monotonic(), self.due
        self.due = [fate for fate in due if fate[0] > now]
        for _, victim, stage, kind in (fate for fate in due if fate[0] <= now):
            if self.part.total < self.quota:
                self.strike(victim, stage, kind)

    def doom(self, stage, kind):
        """Draw the fate of a stage; three in four have one."""
        if self.draw.random() < 0.75:
            (victim,) = self.draw.choices(list(self.engine.victims), self.engine.victims.values())
            self.due.append((time.monotonic() + self.draw.uniform(0, 1.2) * self.seconds[kind], victim, stage, kind))

    def strike(self, victim, stage, kind):
        """Kill, if there is still whom; the coordinator is killed even when the stage has ended, perhaps while that is recorded."""
        with suppress(psutil.Error, ProcessLookupError, KeyError, RuntimeError):
            if victim == "job":
                self.engine.slurm.call("scancel", self.engine.job_of(stage))
            else:
                os.kill(self.engine.pid_of(victim, stage, self.coordinator.pid), signal.SIGKILL)
            self.grid.note("killed", victim)
            self.part.count(victim, kind)
            if self.part.total % 10 == 0:
                self.say(f"{self.part.total} of {self.quota} kills, grid {self.part.rounds + 1}, command {self.part.commands}")


def attend(grid, process, tick=lambda: None):
    """Wait for the end of a command; its exit status. `TimeoutError` when nothing happens any more."""
    heard, changed = time.monotonic(), 0.0
    while process.poll() is None:
        tick()
        time.sleep(0.1)
        said = (grid.said, *(grid.root / "runs" / "logs").glob("*.log"))  # by plain `dvc repro` it is in the former
        if (now := max(file.stat().st_mtime for file in said)) != changed:
            heard, changed = time.monotonic(), now
        if time.monotonic() - heard > STUCK:
            raise TimeoutError(f"nothing was said for {STUCK} s; at work: {sorted(grid.stages_at_work().values())}")
    return process.returncode


def until_whole(grid, engine, killer, part):
    """Give the command again and again, as a person would, until it has nothing left to do."""

    def tick():
        engine.tend()
        killer.tick()

    for _ in range(200):
        part.commands += 1
        process = grid.start(REPRODUCE)
        killer.begin(process)
        status = attend(grid, process, tick)
        if status == 0:
            return
        if status not in (1, -signal.SIGKILL):
            part.problems.append(f"a command ended with {status}")
    raise TimeoutError("200 commands, and the grid is not whole")


def judge(
    grid,  # whole
    truth,
    part,
    excused="ended by signal 9|process was lost|worker was lost",  # why attempts may have failed
):
    """Add what is wrong to a part's problems."""
    journal = aftermath.journal_of(grid.root)
    part.problems += left_in_peace(grid, truth.names) + aftermath.differences(truth.results, aftermath.results(grid.root))
    part.problems += aftermath.repeated(journal, aftermath.ends_of(grid.root, truth.stages)) + aftermath.strange_failures(journal, excused)
    said = set(re.findall(r"(?m)^(?:Traceback|error:|ERROR:).*", grid.said.read_text(errors="replace")))
    part.problems += [f"said: {line}" for line in sorted(said) if not re.search(excused, line)]
    part.rounds += 1


def killed(kind, share):
    """A part: grids on one engine, until a share of all kills is done."""

    def run(folder, truth, part, chosen, draw, say):
        with kind(folder / "engine") as engine:
            grid = type(truth.origin)(folder, truth.origin)
            grid.settle(**engine.settings())
            killer = Killer(grid, engine, part, round(share * chosen.kills), truth.seconds, draw, say)
            while part.total < killer.quota:
                grid.forget()
                until_whole(grid, engine, killer, part)
                judge(grid, truth, part)
                part.problems += engine.left_over()

    return run


# ---- kills inside the write of a lock -----------------------------------------------------------------------------------

# A process that is killed some milliseconds after it has opened a lock for writing, or is about to put a new one in its place.
TIMED = """
import os, runpy, signal, sys, time

kind, number, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
me, left = os.getpid(), number

def hook(event, arguments):
    global left
    if event == "os.rename" and kind == "whole":
        hit = str(arguments[1]).endswith("dvc.lock")
    elif event == "open" and kind == "in place":
        hit = str(arguments[0]).endswith(("dvc.lock", "/rwlock")) and isinstance(arguments[1], str) and "w" in arguments[1]
    elif event == "tempfile.mkstemp" and kind == "part":
        hit = "/part-" in str(arguments[0])
    else:
        return
    left -= hit
    if hit and left == 0 and not os.fork():
        time.sleep(delay)
        os.kill(me, signal.SIGKILL)
        os._exit(0)

sys.addaudithook(hook)
sys.argv = sys.argv[4:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def cut_locks(root):
    """Locks that a kill has left without their end."""
    cut = []
    for lock in root.rglob("dvc.lock"):
        try:
            aftermath.entries_of(lock)
        except ValueError as error:
            cut.append(str(error))
    return cut + [line for line in aftermath.held(root) if "cut" in line]


def killed_in_lock(
    kinds,  # of moments, see TIMED
    command,
    kills,
):
    """A part: commands that are killed in the write of a lock, the one after the other."""

    def run(folder, truth, part, chosen, draw, say):
        grid = type(truth.origin)(folder, truth.origin)
        grid.settle(workers=4)
        part.facts["cut locks"] = 0
        while part.total < kills:
            part.commands += 1
            moment = [draw.choice(kinds), str(draw.randint(1, 4)), str(draw.uniform(0, 0.02))]
            status = attend(grid, grid.start(*moment, *command, program=("-c", TIMED)))
            if status == 0:  # there was nothing left to record
                judge_in_place(grid, truth, part)
                grid.forget()
            elif status == -signal.SIGKILL:
                part.count("coordinator" if command[0] == REPRODUCE else "dvc repro", "the write of a lock")
                cut = cut_locks(grid.root)
                part.facts["cut locks"] += len(cut)
                part.problems += cut if command[0] == REPRODUCE else []
                grid.note("killed", "coordinator")
                after_a_cut(grid, part)
            else:
                part.problems.append(f"{command[0]} ended with {status}")
                return
        part.commands += 1
        if status := attend(grid, grid.start(REPRODUCE)):
            part.problems.append(f"the last command ended with {status}")
        judge_in_place(grid, truth, part)

    return run


def after_a_cut(grid, part):
    """The next command looks at what there is, and mends it; what it would run it has not run."""
    part.commands += 1
    if status := attend(grid, grid.start(REPRODUCE, "--dry-run")):
        part.problems.append(f"after a kill in the write of a lock the next command ended with {status}")
    part.problems += [f"after the next command {line}" for line in cut_locks(grid.root)]


def judge_in_place(grid, truth, part, excused="ended by signal 9|process was lost"):
    """As `judge`; of stages that DVC has run itself, the ends are in what it has said."""
    judge(grid, truth, part, excused)
    texts = [file.read_text(errors="replace") for file in (grid.said, *(grid.root / "runs" / "logs").glob("*.log"))]
    ends = Counter(re.findall(r"(?m)(\w[\w .-]*): \d+\.\d s, see ", "\n".join(texts)))
    if (extra := ends.total() - len(ends)) > part.total:
        part.problems.append(f"{extra} stages were run once more, after {part.total} kills: {ends.most_common(5)}")
    grid.said.write_text("")


# ---- disks --------------------------------------------------------------------------------------------------------------

MEGABYTES = 512
NO_SPACE, NO_WRITE = "No space left on device", "Read-only file system"


@contextmanager
def disk(folder):
    """A disk of its own for a folder."""
    if os.geteuid() or not shutil.which("mount"):
        raise Skipped("only root may mount a disk of its own")
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "torture", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(folder, truth, part, chosen, draw, say):
    """A part: the disk is full from a moment on, or all but full; later there is room again."""
    with disk(folder / "grid"):
        grid, ballast = type(truth.origin)(folder, truth.origin), folder / "grid" / "ballast"
        grid.settle(workers=4)
        for _ in range(6):
            part.commands += 1
            process = grid.start(REPRODUCE)
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(2, 20))
            room, left = shutil.disk_usage(grid.root).free, draw.choice([0, 4, 64, 256]) << 10
            with open(ballast, "wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, room - left))
            status = attend(grid, process)
            ballast.unlink()
            say(f"{left >> 10} KiB left: exit status {status}")
            part.facts[f"commands that ended with {status}"] = part.facts.get(f"commands that ended with {status}", 0) + 1
        part.commands += 1
        if status := attend(grid, grid.start(REPRODUCE)):
            part.problems.append(f"with room again the command ended with {status}")
        judge(grid, truth, part, excused=NO_SPACE)


def read_only_disk(folder, truth, part, chosen, draw, say):
    """A part: nothing can be written, before the first stage, in the middle, and when all is whole."""
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder / "grid")], check=True, capture_output=True)
    with disk(folder / "grid"):
        grid = type(truth.origin)(folder, truth.origin)
        grid.settle(workers=4)
        for moment in ("at first", "in the middle", "at the end"):
            if moment == "in the middle":
                process = grid.start(REPRODUCE)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(8, 15))
                process.kill()
                process.wait()
                grid.note("killed", "coordinator")
                part.count("coordinator", "no stage")
                slurm.until(lambda: not aftermath.living(grid.root), CLEANED, "an end of the stages")
            if moment == "at the end":
                attend(grid, grid.start(REPRODUCE))
            before = aftermath.results(grid.root)
            remount("ro")
            status = attend(grid, grid.start(REPRODUCE))
            remount("rw")
            part.commands += 1
            part.facts[f"exit status {moment}"] = status
            if status not in ((0, 1) if moment == "at the end" else (1,)) or aftermath.results(grid.root) != before:
                part.problems.append(f"on a read-only disk, {moment}: exit status {status}")
        part.commands += 1
        if status := attend(grid, grid.start(REPRODUCE)):
            part.problems.append(f"on a disk that can be written again the command ended with {status}")
        judge(grid, truth, part, excused=NO_WRITE + "|ended by signal 9|process was lost")


# ---- two commands at once -----------------------------------------------------------------------------------------------


REFUSED = "is at work in|acquire lock|busy"  # what the second of two commands may be told


def two_at_once(folder, truth, part, chosen, draw, say):
    """A part: a second command is given while the first is at work, ours and plain `dvc repro` in either order."""
    grid = type(truth.origin)(folder, truth.origin)
    grid.settle(workers=2)
    for commands in (((REPRODUCE,), (REPRODUCE,)), ((REPRODUCE,), (*DVC, "repro")), ((*DVC, "repro"), (REPRODUCE,))):
        grid.forget()
        first = grid.start(*commands[0])
        time.sleep(draw.uniform(0, 12))
        second = grid.start(*commands[1])
        statuses = [attend(grid, process) for process in (first, second)]
        say(f"{' and '.join(' '.join(words) for words in commands)}: exit status {statuses}")
        part.commands += 2
        if 0 not in statuses or not set(statuses) <= {0, 1, 255}:
            part.problems.append(f"of {commands} the exit status is {statuses}")
        if status := attend(grid, grid.start(REPRODUCE)):
            part.problems.append(f"after {commands} a third command ended with {status}")
        judge_in_place(grid, truth, part, excused=REFUSED)


# ---- the command --------------------------------------------------------------------------------------------------------

PARTS = {
    "local": killed(Local, 0.6),
    "dask": killed(Dask, 0.25),
    "slurm": killed(OnSlurm, 0.15),
    "lock": killed_in_lock(["whole", "part"], (REPRODUCE,), 12),
    "lock-of-dvc": killed_in_lock(["in place"], (*DVC, "repro"), 8),
    "full-disk": full_disk,
    "read-only-disk": read_only_disk,
    "two-commands": two_at_once,
}


def parser():
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m tests.torture", description="Kill, fill, interrupt: and see that nothing is lost.")
    made.add_argument("--kills", type=int, default=200, help="random SIGKILLs on the three engines together (default: %(default)s)")
    made.add_argument("--seed", type=int, help="of all draws; without it one is drawn, and printed")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"parts of the campaign: {', '.join(PARTS)} (default: all)")
    made.add_argument("--folder", type=Path, help="for the grids, which are left there; an undisturbed one that is there already is used again")
    made.add_argument("--write", action="store_true", help=f"what these parts found into {RESULT.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return made


def campaign(
    chosen,  # the command line's values
    folder,  # for the grids
    say,  # told of what happens
    make=Grid,  # the grid, or one in its place
    keep=lambda result: None,  # given the result of each part at its end
):
    """Every part that was chosen: its name -> what has become of it, or why it was skipped."""
    say(f"seed {chosen.seed}, {chosen.kills} kills")
    truth, found = undisturbed(folder, make), {}
    say(f"an undisturbed grid: {len(truth.stages)} stages, {len(truth.results)} results")
    for name in chosen.only:
        part, start = Part(), time.monotonic()
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            PARTS[name](folder / name, truth, part, chosen, random.Random(f"{chosen.seed} {name}"), lambda text, name=name: say(f"{name}: {text}"))
            found[name] = part
        except Skipped as reason:
            found[name] = str(reason)
        except Exception as error:
            part.problems.append(f"{type(error).__name__}: {error}")
            found[name] = part
        finally:
            part.seconds = time.monotonic() - start
            part.problems += [f"{process} had to be ended" for process in aftermath.living(folder / name)]
            for process in below(folder / name):
                process.kill()
        say(f"{name}: {found[name] if isinstance(found[name], str) else f'{part.total} kills, {part.rounds} grids, {part.seconds:.0f} s, {len(part.problems)} problems'}")
        for problem in part.problems[:20]:
            say(f"{name}: PROBLEM {problem}")
        keep(result_of({name: found[name]}, chosen.seed))
    return found


def report(part, seed):
    """What is written down of a part of a campaign."""
    about = {"date": time.strftime("%Y-%m-%d"), "seed": seed}
    if isinstance(part, str):
        return about | {"skipped": part}
    kills = {victim: dict(sorted(counts.items())) for victim, counts in sorted(part.kills.items())}
    counts = {"seconds": round(part.seconds), "kills": kills, "cancelled_jobs": part.cancelled, "commands": part.commands, "grids": part.rounds}
    return about | counts | part.facts | {"problems": part.problems}


def surroundings():
    """The machine and the versions under which a campaign took place."""
    versions = {name: version(name) for name in ("dvc", "distributed", "dask-jobqueue", "torch", "transformers")}
    return {"cores": len(os.sched_getaffinity(0)), "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), **versions}


def result_of(found, seed):
    """What is written down of a campaign, or of a part of it."""
    return surroundings() | {"parts": {name: report(part, seed) for name, part in found.items()}}


def counts_of(result):
    """SIGKILLs by victim, and by the kind of stage they hit."""
    victims, kinds = Counter(), Counter()
    for part in result["parts"].values():
        for victim, counts in part.get("kills", {}).items():
            victims[victim] += sum(counts.values())
            kinds.update(counts)
    return victims, kinds


def show(result):
    """The result as a table for people."""
    victims, kinds = counts_of(result)
    head = ["part", *(f"{victim} killed" for victim in victims), "jobs cancelled", "commands", "grids", "minutes", "problems"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name, part in result["parts"].items():
        if "skipped" in part:
            lines.append(f"| {name} | skipped: {part['skipped']}" + " |" * len(head[1:]))
            continue
        killed = [sum(part["kills"].get(victim, {}).values()) or "" for victim in victims]
        cells = [name, *killed, part["cancelled_jobs"] or "", part["commands"], part["grids"], round(part["seconds"] / 60), len(part["problems"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    problems = sum(len(part.get("problems", [])) for part in result["parts"].values())
    at = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return "\n".join([f"{victims.total()} kills, {problems} problems.", "", *lines, "", f"What the kills hit: {at}.", ""])


def write(result):
    """Into the result file and onto the page; parts that were not played this time stay as they are."""
    before = json.loads(RESULT.read_text())["parts"] if RESULT.exists() else {}
    parts = before | result["parts"]
    result = result | {"parts": {name: parts[name] for name in PARTS if name in parts}}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    replace_part(PAGE, "torture", show(result))


def main(arguments=None):
    """Command line; exit status 1 if anything was wrong."""
    chosen = parser().parse_args(arguments)
    chosen.seed = random.SystemRandom().randrange(10**6) if chosen.seed is None else chosen.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    start, folder = time.monotonic(), chosen.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        say = lambda text: print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)
        found = campaign(chosen, folder, say, keep=write if chosen.write else lambda result: None)
    finally:
        for process in below(folder):
            process.kill()
        if not chosen.folder:
            shutil.rmtree(folder, ignore_errors=True)
    result = result_of(found, chosen.seed)
    print(show(result))
    return int(any(part.get("problems") for part in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
