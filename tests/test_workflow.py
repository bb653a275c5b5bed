"""DVC's stages on the workers of Dask: the same locks and files as `dvc repro` makes, whatever is killed on the way."""

import errno
import io
import itertools
import json
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import dask
import psutil
import pytest
from distributed import LocalCluster
from dvc.lock import LockError
from dvc.utils.serialize import dumps_yaml, parse_yaml
from rich.console import Console

from ept.workflow.clusters import BATCH, Cluster, DaskWorkers, LocalWorkers, Workers
from ept.workflow.lock_files import cut_off, entries_of, keep_locks
from ept.workflow.mending import at_work, mend_locks
from ept.workflow.progress import Progress
from ept.workflow.scheduling import ATTEMPTS, Coordinator, Schedule, Watch
from ept.workflow.stages import Stages, keep_others_away, only_coordinator, with_entry
from ept.workflow.workers import Job, Outcome, Setup, run_job
from tests.letters import DVC, HELD, LETTERS, Project, below, one_pass, wait_until


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="module")
def by_dvc(tmp_path_factory):
    """The same project, brought up to date by `dvc repro`."""
    project = Project(tmp_path_factory.mktemp("by-dvc"))
    assert project.dvc("repro", "-q").returncode == 0
    return project


# ---- the same as dvc repro ----------------------------------------------------------------------------------------------


def test_lock_and_outputs_are_those_of_dvc_repro(project, by_dvc):
    assert project.reproduce().complete
    assert project.results() == by_dvc.results()
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize("first", ["dvc", "ours"])
def test_half_a_grid_with_each_and_nothing_is_left_for_either(project, by_dvc, first):
    half = ("a", "b")
    if first == "dvc":
        assert project.dvc("repro", "-q", *half).returncode == 0
        summary = project.reproduce()
        assert sorted(summary.unchanged) == list(half) and sorted(summary.made) == ["c", "d", "joined"]
    else:
        assert sorted(project.reproduce(targets=half).made) == list(half)
        assert project.dvc("repro", "-q").returncode == 0
    assert sorted(project.ran()) == [*LETTERS, "joined"], "no stage ran twice"
    assert not project.reproduce().made and "up to date" in project.dvc("repro").stdout
    ours, theirs = project.results(), by_dvc.results()
    assert parse_yaml(ours.pop("dvc.lock"), "") == parse_yaml(theirs.pop("dvc.lock"), "") and ours == theirs


def test_only_what_has_changed_runs_again_and_what_turns_out_the_same_saves_the_rest(project):
    project.reproduce()
    text = (project.folder / "dvc.yaml").read_text()
    (project.folder / "dvc.yaml").write_text(text.replace("echo a $(", "echo  a $("))  # another command, the same output
    summary = project.reproduce()
    assert list(summary.made) == ["a"] and "joined" in summary.unchanged


@pytest.mark.parametrize("allow_missing", [False, True])
def test_the_time_that_is_left_is_that_of_what_has_to_run(project, allow_missing):
    project.reproduce()
    text = (project.folder / "dvc.yaml").read_text()
    (project.folder / "dvc.yaml").write_text(text.replace("echo a $(", "echo A $("))
    seen = []

    class Seen(Progress):
        def began(self, stage, attempt):
            seen.append(sorted(self.due))
            super().began(stage, attempt)

    project.reproduce(watch=Seen("letters", console=Console(file=io.StringIO())), allow_missing=allow_missing)
    assert seen == [["a", "joined"], ["joined"]], "b, c and d stand, looked at or not"


def test_what_is_only_missing_is_made_again_when_a_stage_that_has_to_run_reads_it(project):
    project.reproduce()
    for name in ("a.txt", "b.txt"):
        (project.folder / name).unlink()
    assert not project.reproduce(allow_missing=True).made and not (project.folder / "a.txt").exists()
    text = (project.folder / "dvc.yaml").read_text()
    (project.folder / "dvc.yaml").write_text(text + "  first:\n    cmd: cat a.txt > first; echo first >> ran\n    deps: [a.txt]\n    outs: [first]\n")
    assert list(project.reproduce(allow_missing=True).made) == ["a", "first"] and not (project.folder / "b.txt").exists()
    assert list(project.reproduce().made) == ["b"], "without it, all that is missing"


def test_whatever_is_missing_and_whatever_differs_no_stage_runs_without_what_it_reads(project):
    project.reproduce()
    whole, lock = (project.folder / "dvc.yaml").read_text(), (project.folder / "dvc.lock").read_text()
    files = {name: (project.folder / name).read_text() for name in ("a.txt", "b.txt", "joined")}
    edits = {None: whole, "a": whole.replace("echo a $(", "echo  a $("), "joined": whole.replace("cat ?.txt", "cat  ?.txt")}
    for gone, (other, text) in itertools.product(itertools.chain.from_iterable(itertools.combinations(files, n) for n in range(4)), edits.items()):
        for name, content in files.items():
            (project.folder / name).unlink(missing_ok=True) if name in gone else (project.folder / name).write_text(content)
        (project.folder / "dvc.yaml").write_text(text)
        stages = Stages(project.folder)
        due = set(stages.due(allow_missing=True))
        assert {stage for stage in stages if stages.changed(stage, allow_missing=True)} == ({other} - {None}), (gone, other)
        assert due == ({"joined", *({"a"} if other == "a" or "a.txt" in gone else ()), *({"b"} if "b.txt" in gone else ())} if other else set()), (gone, other)
    assert (project.folder / "dvc.lock").read_text() == lock


def test_a_missing_file_that_was_made_of_something_else_is_no_reason_to_stand(project):
    project.reproduce()
    (project.folder / "a.txt").unlink()
    (project.folder / "table").write_text("2\n")
    assert project.reproduce(targets=("a",)).complete
    (project.folder / "a.txt").unlink()  # and the lock of `joined` knows the one before
    for letter in "bcd":
        assert project.reproduce(targets=(letter,)).complete
    stages = Stages(project.folder)
    assert stages.changed("joined", allow_missing=True) and stages.due(allow_missing=True) == ["a", "joined"]
    assert list(project.reproduce(allow_missing=True).made) == ["a", "joined"]
    assert (project.folder / "joined").read_text().splitlines()[0] == "a 2"


def test_a_missing_file_of_a_missing_folder_is_as_good_as_the_folder(tmp_path):
    project = Project(tmp_path, extra="""
        rows:
          cmd: mkdir rows; cp table rows/some
          deps: [table]
          outs: [rows: {cache: false}]
        count:
          cmd: wc -l < rows/some > count
          deps: [rows/some]
          outs: [count: {cache: false}]
    """)  # fmt: skip
    project.reproduce()
    shutil.rmtree(tmp_path / "rows")
    assert not project.reproduce(allow_missing=True).made
    (tmp_path / "table").write_text("1\n2\n")
    assert {"rows", "count"} <= project.reproduce(allow_missing=True).made.keys() and (tmp_path / "count").read_text().strip() == "2"


def test_a_stage_comes_from_the_cache_as_with_dvc(tmp_path):
    project = Project(tmp_path, extra="""
        kept:
          cmd: cat table > kept; echo kept >> ran
          deps: [table]
          outs: [kept]
    """)  # fmt: skip
    project.reproduce()
    (tmp_path / "table").write_text("2\n")
    project.reproduce()
    (tmp_path / "table").write_text("1\n")
    project.reproduce()
    assert project.ran().count("kept") == 2 and (tmp_path / "kept").read_text() == "1\n"


NASTY = ["1e5", "12345e67", "yes", "0777", "a: b", "- c", "# d", "'", '"', "word " * 40, "two\nlines", "tab\t", "ö", "", " edge ", "0x1F", "1_000", "null", "~", "2026-11-22"]
NASTY += ["[x]", "{y}", "*z", "&w", "!t", "%u", "@v", "`q`"]


@pytest.mark.parametrize("value", NASTY)
def test_an_entry_of_the_lock_is_what_dvc_writes_whatever_it_holds(value):
    entries = {name: {"cmd": value, "params": {"params.yaml": {"x": [value, {"y": value}]}}, "outs": [{"path": name, "md5": value}]} for name in "abc"}
    text = ""
    for name in ("b", "c", "a"):
        text = with_entry(text, name, entries[name], list("abc"))
    assert text == dumps_yaml({"schema": "2.0", "stages": entries})
    changed = entries | {"b": {"cmd": "other"}}
    assert with_entry(text, "b", {"cmd": "other"}, list("abc")) == dumps_yaml({"schema": "2.0", "stages": changed})


@pytest.mark.parametrize("text", ["stages:\n  a:\n    cmd: x\n", "# mine\nschema: '2.0'\nstages:\n", "schema: '2.0'\ndatasets: []\nstages:\n"])
def test_a_lock_of_another_form_is_left_to_dvc(text):
    assert with_entry(text, "b", {"cmd": "y"}, ["b"]) is None


# ---- order --------------------------------------------------------------------------------------------------------------


def test_with_one_worker_the_order_is_that_of_dvc(project, by_dvc):
    project.reproduce(workers=1)
    assert project.ran() == by_dvc.ran()


def test_a_stage_begins_as_soon_as_what_it_needs_is_whole(monkeypatch):
    needs = {"a": set(), "b": set(), "c": {"a"}, "d": {"b", "c"}}
    schedule = Schedule(needs)
    assert (schedule.next(), schedule.next(), schedule.next()) == ("a", "b", None)
    schedule.done("a")
    assert (schedule.next(), schedule.next()) == ("c", None), "b is not done"
    schedule.put_off("c", 100.0)
    assert schedule.next() is None
    later = time.monotonic() + 101
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert schedule.next() == "c"
    schedule.done("c")
    schedule.done("b")
    assert schedule.next() == "d" and schedule.after(["a"]) == ["c", "d"]


# ---- what goes wrong ----------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_told_with_its_last_line_and_the_rest_goes_on(tmp_path):
    project = Project(tmp_path, extra="""
        broken:
          cmd: echo no rows for $DVC_STAGE >&2; exit 3
          outs: [broken]
        after:
          cmd: cat broken
          deps: [broken]
    """)  # fmt: skip
    summary = project.reproduce()
    assert re.fullmatch(r"exit status 3 on \S+: no rows for broken", summary.failed["broken"])
    assert summary.not_reached == ["after"] and not summary.complete and sorted(summary.made) == [*LETTERS, "joined"]


def test_a_stage_without_its_output_is_not_recorded(tmp_path):
    project = Project(tmp_path, extra="""
        forgetful:
          cmd: "true"
          outs: [nothing]
    """)  # fmt: skip
    summary = project.reproduce()
    assert "nothing" in summary.failed["forgetful"] and "forgetful" not in (tmp_path / "dvc.lock").read_text()


def test_a_missing_dependency_is_told_by_name(project):
    (project.folder / "table").unlink()
    summary = project.reproduce()
    assert set(summary.failed) == set(LETTERS) and "table" in summary.failed["a"] and summary.not_reached == ["joined"]


def test_what_was_edited_while_a_stage_ran_is_not_recorded_and_it_runs_again(tmp_path):
    project = Project(tmp_path, extra="""
        slow:
          cmd: cat table > slow; echo slow >> ran; test $(grep -c slow ran) = 1 && echo 2 > table; true
          deps: [table]
          outs: [slow]
    """)  # fmt: skip
    summary = project.reproduce(workers=1)
    assert summary.complete and project.ran().count("slow") == 2 and (tmp_path / "slow").read_text() == "2\n"
    assert {(tmp_path / f"{x}.txt").read_text() for x in LETTERS} <= {f"{x} {n}\n" for x in LETTERS for n in (1, 2)}
    again = project.reproduce()
    assert again.complete and "slow" in again.unchanged


def test_a_stage_that_is_killed_is_tried_again_and_given_up_at_the_third_time(tmp_path):
    project = Project(tmp_path, extra="""
        once:
          cmd: echo once >> ran; test -e checkpoint || { touch checkpoint; kill -9 $$; }; mv checkpoint once
          outs: [once]
        ever:
          cmd: echo ever >> ran; kill -9 $$
          outs: [ever]
    """)  # fmt: skip
    told = []

    class Told(Watch):
        def failed(self, stage, why, again):
            told.append((stage, again))

    summary = project.reproduce(watch=Told())
    assert list(summary.failed) == ["ever"] and "signal 9" in summary.failed["ever"]
    assert project.ran().count("ever") == ATTEMPTS and project.ran().count("once") == 2 and "once" in summary.made
    assert [again for stage, again in told if stage == "ever"] == [True] * (ATTEMPTS - 1) + [False]


def test_a_stage_that_has_to_leave_its_worker_is_tried_as_often_as_it_takes(project):
    """At the end of a job of a batch system, that is nobody's fault."""
    left = iter([False] * 5)

    class Here(Workers):
        limit = 1

        def submit(self, job):
            future = Future()
            if job.stage == "a" and next(left, True) is False:
                future.set_result(Outcome(-9, 1.0, "", "n1", wanted=False))
            else:
                subprocess.run(job.commands[0], shell=True, cwd=job.folder, check=True)
                future.set_result(Outcome(0, 1.0, "", "n1"))
            return future

    summary = Coordinator(Stages(project.folder), lambda: Here(Cluster(gpus=0), project.setup), Watch()).run()
    assert summary.complete and next(left, "all five were used") == "all five were used"


def test_other_commands_of_dvc_keep_from_a_running_stage_and_we_from_theirs(project):
    stages = Stages(project.folder)
    stages.begin("a")
    other = project.dvc("repro", "a")
    assert other.returncode and "busy" in other.stderr and str(os.getpid()) in other.stderr
    assert project.dvc("repro", "-q", "b").returncode == 0, "it can do what we are not at"
    stages.drop("a")
    assert project.dvc("repro", "-q", "a").returncode == 0

    (project.folder / "dvc.yaml").write_text((project.folder / "dvc.yaml").read_text().replace("cmd: cat", f"cmd: {HELD} cat"))
    by_hand = subprocess.Popen([*DVC, "repro", "-q", "joined"], cwd=project.folder)
    wait_until(lambda: "joined" in (project.folder / ".dvc" / "tmp" / "rwlock").read_text())
    with pytest.raises(LockError):
        Stages(project.folder).begin("joined")
    threading.Timer(1.0, (project.folder / "go").touch).start()
    assert project.reproduce().complete, "it waits for the other"
    assert by_hand.wait() == 0 and project.dvc("status", "-q").returncode == 0


@pytest.mark.parametrize("where", ["a stage that runs", "a stage whose worker is not there", "the journal of a stage that begins"])
def test_every_stage_lets_go_of_its_files_even_where_another_cannot(project, where, monkeypatch):
    """On a full disk the first can't. What was held until the interpreter ends would start a thread there, and wait for it for ever."""
    stages, tried = Stages(project.folder), []

    def drop(name):
        tried.append(name)
        stages.begun.pop(name)[0].close()
        raise OSError(errno.ENOSPC, "No space left on device")

    class Never(Workers):
        limit = 3

        def submit(self, job):
            if len(stages.begun) == 2 and where == "a stage whose worker is not there":
                raise RuntimeError("no worker is there")
            return Future()

    class Full(Watch):
        def tick(self, *_):
            if len(stages.begun) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

    class FullWhenOneBegins(Watch):
        began = Full.tick

    monkeypatch.setattr(stages, "drop", drop)
    with pytest.raises(OSError, match="No space left"):
        watch = FullWhenOneBegins() if where == "the journal of a stage that begins" else Full()
        Coordinator(stages, lambda: Never(Cluster(gpus=0), project.setup), watch).run()
    assert len(tried) == 2 and not stages.begun
    assert json.loads((project.folder / ".dvc" / "tmp" / "rwlock").read_text()) == {}


def test_a_second_coordinator_is_told_who_the_first_is(project):
    with only_coordinator(project.folder), pytest.raises(RuntimeError, match=f"process {os.getpid()} on .* is at work in"), only_coordinator(project.folder):
        pass
    with only_coordinator(project.folder):
        pass


# ---- workers ------------------------------------------------------------------------------------------------------------


def test_a_script_is_run_as_python_runs_it(tmp_path):
    (tmp_path / "a.py").write_text("import sys, b\nprint(__name__, sys.argv, b.__name__, sys.stdin.read())\nsys.exit(int(sys.argv[1]))\n")
    (tmp_path / "b.py").write_text("")
    (tmp_path / "c.py").write_text("raise ValueError('no such task')\n")
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    python = os.path.relpath(sys.executable, tmp_path)
    for command, status, words in (("python a.py 0 x", 0, "__main__ ['a.py', '0', 'x'] b"), ("python a.py 4", 4, "['a.py', '4']"), ("python c.py", 1, "ValueError: no such task")):
        outcomes = [run_job(Job(command, (how,), str(tmp_path)), setup) for how in (command, command.replace("python", python))]
        assert [o.status for o in outcomes] == [status, status], "forked, and as a command"
        assert setup.log_of(command).read_text().count(words) == 2


def test_what_a_stage_has_started_ends_with_it(tmp_path):
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    assert run_job(Job("a", (f"sleep 1000 & cd {tmp_path}; sleep 1001 &",), str(tmp_path)), setup).status == 0
    wait_until(lambda: not below(tmp_path))


PRELOADED = """
import sys
from ept.utils.files import temporary_folder
from ept.workflow.workers import Job, Setup, run_job
folder = sys.argv[1]
setup = Setup(folder + "/logs", folder + "/locks", preload=("costly",), path=(folder + "/modules",))
with temporary_folder():
    for name in "ab":
        job = Job(name, ("python stage.py",), folder)
        assert not run_job(job, setup).status, setup.log_of(name).read_text()
open(folder + "/main", "a").write(__name__ + " ")
"""

LOST = """
import sys
from ept.workflow.workers import Job, Setup, run_job
folder = sys.argv[1]
outcome = run_job(Job("a", ("true",), folder), Setup(folder + "/logs", folder + "/locks", preload=("costly",), path=(folder + "/modules",)))
print(outcome.killed, outcome)
"""


def test_the_fork_server_imports_the_modules_once_and_the_main_program_never(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "costly.py").write_text(f"import os\nwith open({str(tmp_path / 'imported')!r}, 'a') as f: print(os.getpid(), file=f)\n")
    told = "with open('stages', 'a') as f: print(os.getpid(), os.environ['PYTHONPATH'] or 'none', file=f)\n"
    (tmp_path / "stage.py").write_text("import os, costly, multiprocessing\ncostly.lock = multiprocessing.RLock()\n" + told)
    (tmp_path / "program.py").write_text(PRELOADED)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as place:  # a short name, as the system's own has
        environment["TMPDIR"] = place
        done = subprocess.run([sys.executable, str(tmp_path / "program.py"), str(tmp_path)], env=environment, timeout=300, capture_output=True, text=True)
        assert not os.listdir(place), "the socket of the fork server is gone"
    assert (done.returncode, done.stderr) == (0, ""), "a lock, as progress bars have one, is gone with its stage, and nobody warns of it"
    imported, stages = ((tmp_path / name).read_text().split("\n")[:-1] for name in ("imported", "stages"))
    assert len(imported) == 1 and len(stages) == 2, "one import for all stages"
    assert all(line.endswith(" none") for line in stages), "a stage's own commands find the modules that they would find without us"
    assert (tmp_path / "main").read_text() == "__main__ ", "no stage has run the program that started it"


def test_a_fork_server_that_ends_is_nothing_that_the_stage_has_done(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "costly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "program.py").write_text(LOST)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py"), str(tmp_path)], timeout=300, capture_output=True, text=True)
    assert done.stdout.startswith("True its process was lost on "), done.stderr


def test_a_module_that_cannot_be_imported_beforehand_is_told_in_the_log(tmp_path):
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"), preload=("no_such_module_here",))
    assert run_job(Job("a", ("true",), str(tmp_path)), setup).error == "ModuleNotFoundError: No module named 'no_such_module_here'"


def test_no_two_processes_are_at_one_stage(tmp_path):
    """A worker that was lost may still be on its way out when another begins the stage."""
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    program = "from ept.workflow.workers import *; import sys; run_job(Job('a', ('echo begin >> said; sleep 2; echo end >> said',), sys.argv[1]), Setup(*sys.argv[2:]))"
    file = tmp_path / "run.py"
    file.write_text(f"if __name__ == '__main__':\n    {program}\n")
    first, second = (subprocess.Popen([sys.executable, file, tmp_path, setup.logs, setup.locks]) for _ in range(2))
    assert first.wait() == second.wait() == 0
    assert (tmp_path / "said").read_text().split() == ["begin", "end"] * 2


def test_each_gpu_has_one_run_at_a_time_and_what_needs_none_goes_on(tmp_path):
    busy = f"mkdir {tmp_path}/gpu-$CUDA_VISIBLE_DEVICES && sleep 0.3 && rmdir {tmp_path}/gpu-$CUDA_VISIBLE_DEVICES"
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    with LocalWorkers(Cluster(gpus=2), setup) as workers:
        gpu = [workers.submit(Job(f"gpu-{i}", (busy,), str(tmp_path), resources={"gpu": 1})) for i in range(6)]
        none = workers.submit(Job("cpu", ('test -z "$CUDA_VISIBLE_DEVICES"',), str(tmp_path)))
        assert [future.result().status for future in (*gpu, none)] == [0] * 7


def test_a_process_that_ends_while_another_starts_is_not_lost(tmp_path, monkeypatch):
    """Whoever starts a process asks those before it how they have ended; the answer can be read once."""
    read = multiprocessing.forkserver.read_signed

    def slow(descriptor):
        time.sleep(0.05)
        return read(descriptor)

    monkeypatch.setattr(multiprocessing.forkserver, "read_signed", slow)
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    with LocalWorkers(Cluster(workers=4, gpus=0), setup) as workers:
        futures = [workers.submit(Job(str(i), (f"exit {i % 3}",), str(tmp_path))) for i in range(24)]
        assert [future.result().status for future in futures] == [0, 1, 2] * 8


@pytest.mark.parametrize("engine", BATCH)
def test_the_script_of_a_job_asks_for_what_the_settings_say(engine, tmp_path):
    asked = {"memory": "64GB", "walltime": "48:00:00", "directives": "--qos=low; --x=y", "prologue": "module load cuda"}
    cluster = Cluster(engine, gpus=4, runs_per_gpu=2, cores=16, **asked)
    script = cluster.job_script(str(tmp_path))
    assert BATCH[engine][1].format(4) in script and "--qos=low" in script and "--x=y" in script
    assert "--nthreads 9" in script and "--resources gpu=8" in script and "--no-nanny" in script and "--lifetime 172680s" in script
    assert "module load cuda" in script


# ---- real workers, killed -----------------------------------------------------------------------------------------------


@contextmanager
def running_cluster(workers):
    """A Dask cluster of worker processes, as one that runs already."""
    settings = dask.config.set({"distributed.worker.daemon": False, "distributed.scheduler.allowed-failures": 0})
    with settings, LocalCluster(workers, 1, processes=True, dashboard_address=None, memory_limit=0) as cluster:
        yield cluster


def test_all_workers_of_a_scheduler_that_runs_already_are_used(tmp_path):
    """However many of them there are; `workers` counts those that we start ourselves."""
    setup = Setup(str(tmp_path / "logs"), str(tmp_path / "locks"))
    with (
        LocalCluster(n_workers=3, threads_per_worker=2, processes=False, protocol="tcp://", dashboard_address=None, memory_limit=0) as cluster,
        DaskWorkers(Cluster(cluster.scheduler_address, workers=1, gpus=0), setup) as workers,
    ):
        workers.client.wait_for_workers(3, timeout=120)
        assert workers.limit == 2 * 3 * 2


def test_a_worker_that_is_killed_loses_nothing(tmp_path, by_dvc):
    project = Project(tmp_path, slow="sleep 1;")
    killed = []

    class Killer(Watch):
        def tick(self):
            if not killed and (busy := [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:2] == ["sleep", "1"]]):
                worker = next(p for p in busy[0].parents() if "spawn_main" in " ".join(p.cmdline()) or "dask" in " ".join(p.cmdline()).lower())
                killed.append(worker.pid)
                worker.kill()

    with running_cluster(3) as cluster:
        summary = project.reproduce(engine=cluster.scheduler_address, watch=Killer())
    assert killed and summary.complete, summary
    assert {name: text for name, text in project.results().items() if name != "dvc.lock"} == {name: text for name, text in by_dvc.results().items() if name != "dvc.lock"}
    assert sorted(project.ran()) == [*LETTERS, "joined"], "no stage came to its end twice"


def test_a_signal_at_the_end_of_a_wait_does_not_make_it_last_until_a_stage_ends(project):
    """As a `SimpleQueue` does, which after a signal may wait for ever: Ctrl-C would be heard when the next stage has ended, in hours."""
    coordinator = Coordinator(Stages(project.folder), lambda: None, Watch())
    stage = threading.Timer(5, coordinator.ended.put, [("a", Future())])
    old = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.3))
    stage.start()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        coordinator.collect(wait=0.2)
        assert stage.is_alive(), "the stage has ended first"
    finally:
        stage.cancel()
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_coordinator_that_is_stopped_or_killed_leaves_nothing_behind_and_the_next_goes_on(tmp_path, by_dvc, how):
    root = tmp_path / "project"
    root.mkdir()
    project = Project(root, slow=f"case $DVC_STAGE in c|d) {HELD}; esac;")
    command = one_pass(project, tmp_path / "pass.py")
    first = subprocess.Popen(command, start_new_session=True)
    wait_until(lambda: len(project.ran()) >= 2)
    first.send_signal(how)
    assert first.wait(120) == (130 if how == signal.SIGINT else -how)
    wait_until(lambda: not below(root))
    (root / "go").touch()
    recorded = [x for x in LETTERS if (root / "dvc.lock").exists() and f"  {x}:\n" in (root / "dvc.lock").read_text()]
    before = project.ran()
    assert subprocess.run(command).returncode == 0
    assert sorted(project.ran()[len(before) :]) == sorted({*LETTERS, "joined"} - set(recorded)), "what is recorded does not run again"
    assert project.dvc("status", "-q").returncode == 0
    assert not list((root / ".dvc" / "tmp").glob("part-*"))


# ---- what a killed `dvc repro` leaves ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A project that DVC has brought up to date, and whose locks were copied when its last stage began; its files."""
    project = Project(tmp_path_factory.mktemp("kept"))
    assert project.dvc("repro", "-q", *LETTERS).returncode == 0
    keep_locks(project.folder)  # as the last stage does
    assert project.dvc("repro", "-q").returncode == 0
    return project, project.results()


@pytest.fixture
def whole(kept):
    """The same, and it is so again afterwards."""
    project, results = kept
    yield project
    for name, text in results.items():
        (project.folder / name).write_text(text)
    (project.folder / "ran").write_text("\n".join([*LETTERS, "joined", ""]))


@pytest.mark.parametrize("where", ["nothing is left", "in a line", "behind a line"])
def test_a_lock_that_was_cut_off_is_mended_and_only_what_it_did_not_know_runs(whole, where):
    file = whole.folder / "dvc.lock"
    lock = file.read_text()
    middle = lock.index("  c:") + 15
    file.write_text(lock[: {"nothing is left": 0, "in a line": middle, "behind a line": lock.index("\n", middle) + 1}[where]])
    stages = Stages(whole.folder)
    assert [text.startswith("dvc.lock was cut off when a command of DVC was killed; mended") for text in stages.mended] == [True]
    summary = whole.reproduce()
    assert summary.complete and list(summary.made) == ["joined"], "its end was in no copy"
    assert parse_yaml(file.read_text(), "") == parse_yaml(lock, "") and not mend_locks(whole.folder)


def test_a_cut_of_a_lock_is_seen_wherever_it_is_and_none_in_a_whole_one(whole):
    file = whole.folder / "dvc.lock"
    lock = file.read_text()
    keep_locks(whole.folder)
    for end in range(0, len(lock), 61):
        file.write_text(lock[:end])
        assert len(mend_locks(whole.folder)) == 1 and list(entries_of(file.read_text())) == list(entries_of(lock)), f"cut at {end} of {len(lock)}"
    file.write_text(lock)
    assert not mend_locks(whole.folder) and not cut_off(whole.folder)


def test_a_copy_that_another_stage_has_in_the_making_is_left_to_it(whole):
    keep_locks(whole.folder)
    making = whole.folder / ".dvc" / "tmp" / "locks" / ".dvc.lock.5960dcb1.ept-new"
    making.touch()
    keep_locks(whole.folder)
    assert making.exists()
    making.unlink()


def test_a_lock_that_was_removed_on_purpose_stays_so(whole):
    (whole.folder / "dvc.lock").unlink()
    keep_locks(whole.folder)  # as the first stage does
    assert not mend_locks(whole.folder) and sorted(whole.reproduce().made) == [*LETTERS, "joined"]


def test_a_lock_that_git_has_brought_back_is_no_cut_one(tmp_path):
    project = Project(tmp_path)
    git = lambda *words: subprocess.run(["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *words], cwd=tmp_path, check=True, capture_output=True)
    project.reproduce(targets=("a", "b"))
    git("init", "-q")
    git("add", "dvc.lock")
    git("commit", "-qm", "two")
    project.reproduce()
    keep_locks(tmp_path)
    git("checkout", "-q", "--", "dvc.lock")
    assert not mend_locks(tmp_path)
    (tmp_path / ".dvc" / "tmp" / "locks" / "dvc.lock").unlink()
    (tmp_path / "dvc.lock").write_text("")
    assert "0 of its copy and 2 of the last commit" in mend_locks(tmp_path)[0]


@pytest.mark.parametrize(
    "left", ["", '{"write": {"/x', "[1]", '{"write": {"FILE": {"pid": 1, "cmd": "dvc repro"}}}'], ids=["empty", "cut", "other", "number of a process used again"]
)
def test_a_list_of_those_at_work_that_says_nothing_true_stops_nobody(whole, left):
    file = whole.folder / ".dvc" / "tmp" / "rwlock"
    file.write_text(left.replace("FILE", str(whole.folder / "a.txt")))
    os.utime(file, (0, 0))  # before this machine was started
    assert whole.dvc("repro", "-q").returncode, "DVC itself does not go on"
    os.utime(file, (0, 0))
    said = []
    with keep_others_away(whole.folder, said.append):
        assert whole.reproduce().complete
    assert len(said) == ("pid" not in left) and whole.dvc("repro", "-q").returncode == 0


# ---- two at once --------------------------------------------------------------------------------------------------------


def test_dvc_by_hand_beside_a_coordinator_loses_nothing_and_names_it(whole):
    (whole.folder / "table").write_text("2\n")
    before = whole.results()
    with keep_others_away(whole.folder):
        done = whole.dvc("repro")
        assert done.returncode and f"(PID {os.getpid()})" in done.stderr and whole.results() == before
    (whole.folder / "table").write_text("1\n")


def test_a_coordinator_waits_for_dvc_by_hand_and_finds_its_work_done(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    project = Project(root, slow=HELD)
    by_hand = subprocess.Popen([*DVC, "repro", "-q"], cwd=root)
    wait_until(lambda: at_work(root))
    said = tmp_path / "said"
    with open(said, "w") as file:
        waiting = subprocess.Popen(one_pass(project, tmp_path / "pass.py"), env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=file)
    wait_until(lambda: f"process {by_hand.pid} (" in said.read_text() and "this one waits for its end" in said.read_text())
    (root / "go").touch()
    assert waiting.wait(120) == by_hand.wait(120) == 0 and sorted(project.ran()) == [*LETTERS, "joined"], "nothing was made twice"
