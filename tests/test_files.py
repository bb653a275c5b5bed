"""Files and folders are whole or not there, whatever is killed; what the dead have left is swept, what the living make is not."""

import errno
import multiprocessing
import os
import py_compile
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from command import drop_damaged_bytecode
from ept.utils.files import replace_folder, sweep, temporary_folder, whole_file, whole_folder, write_atomic
from ept.utils.locks import only_one

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")


def in_a_process(work, *arguments):
    """Have a process do something, and wait for its end."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill(folder, number):
    """Three files that say the same."""
    for name in "abc":
        write_atomic(folder / name, f"{number}" * 1000)


def content(folder):
    """What stands in the files of a folder, hidden ones too."""
    return {path.name: path.read_text()[:1] for path in folder.iterdir()}


def test_what_a_killed_process_had_in_the_making_is_swept_and_nothing_else(tmp_path):
    def killed():
        with whole_file(tmp_path / "table.csv"), whole_folder(tmp_path / "model") as new:
            fill(new, 1)
            die()

    assert in_a_process(killed) == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".table.csv.backup.old").touch()
    with whole_folder(tmp_path / "mine") as mine, whole_file(tmp_path / "other") as other:
        assert len(sweep(tmp_path)) == 2 and mine.exists() and Path(other.name).exists()
    assert {p.name for p in tmp_path.iterdir()} == {".table.csv.backup.old", "mine", "other"} and sweep(tmp_path) == []


def test_the_next_write_of_a_file_sweeps_what_was_left_of_it(tmp_path):
    def killed():
        with whole_file(tmp_path / "table.csv"):
            die()

    in_a_process(killed)
    write_atomic(tmp_path / "tables.csv", "other")
    assert len(list(tmp_path.iterdir())) == 2
    write_atomic(tmp_path / "table.csv", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", "tables.csv"}


def test_a_folder_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path):
    """At 25 random moments of a process that replaces it again and again."""
    folder, began, chance = tmp_path / "model", time.perf_counter(), random.Random(0)
    with whole_folder(folder) as new:
        fill(new, 0)
    usual = time.perf_counter() - began

    def replacing():
        for number in range(1, 10):
            with whole_folder(folder) as new:
                fill(new, number)

    for _ in range(25):
        process = FORK.Process(target=replacing)
        process.start()
        time.sleep(chance.random() * 4 * usual)
        process.kill()
        process.join()
        sweep(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert sorted(content(folder)) == ["a", "b", "c"] and len(set(content(folder).values())) == 1


def test_a_folder_that_was_set_aside_comes_back(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "model") as new:
        fill(new, 1)

    def killed():
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: die() if Path(b).name == "model" else replace(a, b))
        with whole_folder(tmp_path / "model") as new:
            fill(new, 2)

    assert in_a_process(killed) == -signal.SIGKILL and not (tmp_path / "model").exists()
    sweep(tmp_path)
    assert content(tmp_path / "model") == dict.fromkeys("abc", "1") and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path):
    fill(tmp_path / "model", 1)
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", tmp_path / "model")
    assert content(tmp_path / "model") == dict.fromkeys("abc", "1") and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: write_atomic(tmp_path / "score.json", "{}"), lambda: fill_whole(tmp_path / "model")):
        with pytest.raises(OSError, match=r"No space left on device: '.*(score.json|model.*)'") as told:
            write()
        assert told.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def fill_whole(folder):
    with whole_folder(folder) as new:
        fill(new, 1)


def test_what_is_written_can_be_read_by_those_whom_the_user_lets(tmp_path):
    usual = os.umask(0o027)
    try:
        file = write_atomic(tmp_path / "a", "1")
        fill_whole(tmp_path / "model")
    finally:
        os.umask(usual)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (file, tmp_path / "model")] == [0o640, 0o750]


def test_temporary_files_of_a_killed_process_are_swept_by_the_next(monkeypatch):
    def killed():
        with temporary_folder() as folder:
            (folder / "big").touch()
            die()

    with tempfile.TemporaryDirectory() as place:  # a short name, as the system's own has
        monkeypatch.setattr(tempfile, "tempdir", place)
        in_a_process(killed)
        assert len(os.listdir(place)) == 1
        with temporary_folder() as folder:
            assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder) and os.listdir(place) == [folder.name] and not os.listdir(folder)
        assert not os.listdir(place) and tempfile.gettempdir() == place


def test_the_folder_of_a_fork_server_stays_until_the_process_ends(monkeypatch):
    """multiprocessing removes it itself then, and complains where it is gone; also after an error."""
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        with pytest.raises(OSError, match="no room"), temporary_folder() as folder:
            (folder / "pymp-1").mkdir()
            raise OSError("no room")
        assert (folder / "pymp-1").exists() and tempfile.gettempdir() == place


# ---- one at a time ------------------------------------------------------------------------------------------------------


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    def killed():
        with only_one(tmp_path / "lock", "here"):
            die()

    in_a_process(killed)
    with only_one(tmp_path / "lock", "here"):
        text = (tmp_path / "lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        with pytest.raises(RuntimeError, match="is at work in here; wait for its end, or stop it with Ctrl-C") as told, only_one(tmp_path / "lock", "here"):
            pass
        assert str(told.value).startswith(text)


def test_no_two_are_at_one_place_though_its_folder_is_removed(tmp_path):
    at, most, said = [], [], []

    def work():
        for _ in range(20):
            with only_one(tmp_path / "place" / "lock", "here", said.append):
                at.append(1)
                most.append(len(at))
                at.pop()
                (tmp_path / "place" / "lock").unlink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and set(most) == {1} and all("this one waits for its end" in text for text in said)


# ---- Ctrl-C -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, sys, time
sys.path.insert(0, "nbs/pipelines")
from command import end_at_ctrl_c

end_at_ctrl_c("the same command goes on from here")
multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,)).start()
print("begun", flush=True)
while True:
    try:
        time.sleep(1000)
    except BaseException:
        print("caught by somebody")
"""


def test_ctrl_c_ends_a_command_with_one_line_and_leaves_nothing_running():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    child = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130 and said == ("", "\nstopped; the same command goes on from here\n")
    assert len(child) == 1 and not psutil.wait_procs(child, 120)[1]


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "nbs" / "pipelines").glob("*.py") if "__main__" in p.read_text()))
def test_every_command_of_the_pipeline_ends_at_ctrl_c(script):
    text = (ROOT / "nbs" / "pipelines" / script).read_text()
    assert "end_at_ctrl_c(" in text.partition("__main__")[2] or "end_at_ctrl_c(" in text.partition("def main")[2]


def test_bytecode_that_a_full_disk_has_cut_off_is_removed_and_no_other(tmp_path):
    """Python writes it anew; what it finds it believes, and would fail at each time."""
    for name in ("cut", "whole"):
        (tmp_path / f"{name}.py").write_text("answer = [42] * 3\n" * 200)
    files = {name: Path(py_compile.compile(tmp_path / f"{name}.py")) for name in ("cut", "whole")}
    files["cut"].write_bytes(files["cut"].read_bytes()[:1024])
    other = files["cut"].with_name("cut.cpython-27.pyc")
    other.write_bytes(b"of another Python")
    command = [sys.executable, "-c", "import cut, whole"]
    assert "marshal data too short" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr
    assert drop_damaged_bytecode([tmp_path]) == [files["cut"]] and files["whole"].exists() and other.exists()
    assert subprocess.run(command, cwd=tmp_path).returncode == 0 and drop_damaged_bytecode([tmp_path]) == []
