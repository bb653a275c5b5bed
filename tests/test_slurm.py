"""Slurm itself: jobs, GPUs, and the workers of Dask that are its jobs. `make test-slurm` starts one; other runs skip these."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from dask_jobqueue import SLURMCluster
from distributed import Client

from ept.workflow.scheduling import Watch
from tests.letters import LETTERS, Project, one_pass
from tests.slurm import CONFIGURATION, NODES, Slurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(os.environ.get("EPT_TEST_SLURM") != "1", reason="starts a Slurm; run `make test-slurm`")]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm"), gpus=2) as slurm:
        yield slurm


@pytest.fixture
def slurm(started, monkeypatch):
    """The Slurm of this module, without jobs; its commands are those of this process."""
    for name, value in started.environment.items():
        monkeypatch.setenv(name, value)
    yield started
    if jobs := started.jobs():
        started.call("scancel", *jobs)
    until(lambda: not started.jobs(), 30, "the end of what a test left behind")


def submit(slurm, script, *options):
    """A job that writes into a file: its id, and the file."""
    job = slurm.call("sbatch", "--parsable", f"--output={slurm.folder}/%j.out", *options, "--wrap", script)
    return job, slurm.folder / f"{job}.out"


def finish(slurm, *jobs):
    until(lambda: not set(jobs) & set(slurm.jobs()), 30, f"the end of {jobs}")


def run(slurm, *jobs):
    until(lambda: all(slurm.jobs().get(job) == "RUNNING" for job in jobs), 30, f"the start of {jobs}")


def named(folder):
    """Command lines of processes that have the folder in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile
            continue
    return [line for line in found if f"{folder}/" in line]


# ---- jobs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", NODES)
def test_a_job_runs_on_each_node(slurm, node):
    job, output = submit(slurm, "echo $SLURMD_NODENAME", f"--nodelist={node}")
    finish(slurm, job)
    assert output.read_text().split() == [node]


def test_a_job_has_the_gpus_that_it_asks_for_and_waits_until_they_are_free(slurm):
    ask = ("--nodelist=n1", "--gres=gpu:1")
    running = [submit(slurm, "echo $CUDA_VISIBLE_DEVICES; sleep 600", *ask) for _ in range(2)]
    run(slurm, *(job for job, _ in running))
    until(lambda: all(output.read_text() for _, output in running), 10, "what the jobs print")
    assert {output.read_text().strip() for _, output in running} == {"0", "1"}
    third, _ = submit(slurm, "true", *ask)
    until(lambda: slurm.call("squeue", "--noheader", f"--jobs={third}", "--format=%T %r") == "PENDING Resources", 10, "a job that waits for a GPU")
    slurm.call("scancel", running[0][0])
    finish(slurm, third)


def test_more_gpus_than_a_node_has_are_refused(slurm):
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        submit(slurm, "true", "--gres=gpu:3")


def test_scancel_ends_a_job(slurm):
    job, _ = submit(slurm, "sleep 600")
    run(slurm, job)
    slurm.call("scancel", job)
    finish(slurm, job)
    assert "CANCELLED" in slurm.call("scontrol", "show", "job", job)


# ---- workers of Dask ----------------------------------------------------------------------------------------------------


@contextmanager
def two_workers(slurm):
    """A cluster that keeps two jobs alive, each of which is a worker; and a client of it."""
    options = dict(cores=1, processes=1, memory="512MB", nanny=False, interface="lo", scheduler_options={"dashboard_address": ":0"})
    folders = dict(log_directory=str(slurm.folder / "workers"), local_directory=str(slurm.folder / "scratch"))
    with SLURMCluster(**options, **folders) as cluster, Client(cluster) as client:
        cluster.adapt(minimum_jobs=2, maximum_jobs=2)
        client.wait_for_workers(2, timeout=60)
        yield client


def workers(client):
    """Addresses, asked for anew; `scheduler_info` may be some seconds old."""
    return set(client.nthreads())


def test_dask_computes_on_two_jobs(slurm):
    with two_workers(slurm) as client:
        assert list(slurm.jobs().values()) == ["RUNNING"] * 2
        assert [client.submit(sum, [1, 2], workers=[worker], pure=False).result(30) for worker in workers(client)] == [3, 3]
    finish(slurm, *slurm.jobs())


def test_a_worker_whose_job_was_cancelled_is_replaced(slurm):
    with two_workers(slurm) as client:
        before, (cancelled, kept) = workers(client), slurm.jobs()
        assert len(before) == 2
        slurm.call("scancel", cancelled)
        until(lambda: len(workers(client)) == 2 and workers(client) != before, 60, "a worker in the place of the one that was cancelled")
        finish(slurm, cancelled)
        assert kept in slurm.jobs() and list(slurm.jobs().values()) == ["RUNNING"] * 2
        assert client.submit(sum, [1, 2], workers=list(workers(client) - before)).result(30) == 3


# ---- a grid -------------------------------------------------------------------------------------------------------------

JOBS = {"engine": "slurm", "workers": 2, "memory": "512MB", "walltime": "00:10:00"}


def by_hand(folder):
    """What `dvc repro` makes of the same project."""
    folder.mkdir()
    project = Project(folder)
    assert project.dvc("repro", "-q").returncode == 0
    return {name: text for name, text in project.results().items() if name != "dvc.lock"}


def test_a_cancelled_job_costs_a_grid_nothing(slurm, tmp_path):
    root, cancelled = tmp_path / "grid", []
    root.mkdir()
    project = Project(root, slow="sleep 3;")

    class Canceller(Watch):
        def tick(self):
            running = [job for job, state in slurm.jobs().items() if state == "RUNNING"]
            if not cancelled and len(running) == 2 and list((root / "logs").glob("*.log")):
                cancelled.append(running[0])
                slurm.call("scancel", running[0])

    summary = project.reproduce(**JOBS, watch=Canceller())
    assert cancelled and summary.complete, summary
    assert sorted(project.ran()) == [*LETTERS, "joined"], "no stage came to its end twice"
    assert {name: text for name, text in project.results().items() if name != "dvc.lock"} == by_hand(tmp_path / "by-hand")
    assert project.dvc("status", "-q").returncode == 0
    finish(slurm, *slurm.jobs())


def test_jobs_end_with_a_coordinator_that_is_killed_and_the_next_goes_on(slurm, tmp_path):
    root = tmp_path / "grid"
    root.mkdir()
    project = Project(root, slow="sleep 3;")
    command = one_pass(project, tmp_path / "pass.py", **JOBS)
    first = subprocess.Popen(command)
    until(project.ran, 60, "the first stage")
    first.kill()
    first.wait()
    until(lambda: not slurm.jobs(), 60, "the end of its jobs")
    assert subprocess.run(command).returncode == 0
    assert project.dvc("status", "-q").returncode == 0
    assert {name: text for name, text in project.results().items() if name != "dvc.lock"} == by_hand(tmp_path / "by-hand")


def test_a_stage_has_the_gpu_of_its_job(slurm, tmp_path):
    stages = "".join(f"""
        {letter}{letter}:
          cmd: echo "$CUDA_VISIBLE_DEVICES" > {letter}{letter}
          meta: {{resources: {{gpu: 1}}}}
          outs: [{letter}{letter}]
    """ for letter in "xyz")  # fmt: skip
    project = Project(tmp_path, extra=f"""
        none:
          cmd: echo "none$CUDA_VISIBLE_DEVICES" > none
          outs: [none]
    {stages}""")  # fmt: skip
    assert project.reproduce(**JOBS, gpus=1).complete
    assert {(tmp_path / name).read_text().strip() for name in ("xx", "yy", "zz")} <= {"0", "1"}
    assert (tmp_path / "none").read_text() == "none\n"


# ---- the Slurm of the tests ---------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_slurm_and_its_neighbour_goes_on(slurm, tmp_path):
    with Slurm(tmp_path / "other") as other:
        job, _ = submit(other, "trap '' TERM; while true; do sleep 1; done")
        run(other, job)
        assert len(named(other.folder)) >= 4 and other.processes()
        assert not set(slurm.jobs()), "each has jobs of its own"
    assert not named(other.folder) and not other.processes()
    assert not [path for path in other.folder.rglob("*") if path.is_socket()]
    assert slurm.processes() and slurm.call("sinfo", "--noheader", "--format=%T") == "idle"


def test_the_command_line_starts_a_slurm_that_another_process_stops(tmp_path):
    command = [sys.executable, "tests/slurm.py"]
    printed = subprocess.run([*command, "start", tmp_path, "--gpus", "1"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    slurm = Slurm(tmp_path)
    try:
        assert printed == f"export SLURM_CONF={slurm.environment['SLURM_CONF']}\n"
        assert slurm.call("sinfo", "--noheader", "--format=%D %T %G") == "2 idle gpu:1"
    finally:
        subprocess.run([*command, "stop", tmp_path], cwd=ROOT, check=True)
    assert not slurm.processes()


def test_a_second_start_in_the_same_folder_is_refused(slurm):
    with pytest.raises(RuntimeError, match="runs in .* already"):
        Slurm(slurm.folder).start()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(ValueError, match="holds other things than a Slurm"):
        Slurm(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_what_fails_to_start_leaves_nothing(tmp_path, monkeypatch):
    """Here the node's daemon does, when those of munge and of the controller run."""
    monkeypatch.setattr("tests.slurm.CONFIGURATION", CONFIGURATION.replace("proctrack/pgid", "proctrack/unknown"))
    slurm = Slurm(tmp_path / "broken")
    with pytest.raises(RuntimeError, match="slurmd -N n1 .* ended with 1"):
        slurm.start()
    assert not slurm.processes() and not named(slurm.folder)


def test_a_missing_program_is_named_with_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.slurm.PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not found: .*slurmctld.* apt-get install slurm-wlm munge"), Slurm(tmp_path):
        pass


@pytest.mark.parametrize("folder", ["x" * 100, "two words"])
def test_a_folder_whose_path_slurm_cannot_use_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="at most 80 characters without blanks"):
        Slurm(tmp_path / folder)
