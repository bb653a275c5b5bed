"""Commands in forked processes: what they answer is what an interpreter of their own would."""

import os
import signal
import subprocess
import sys

import pytest

import forks

SCRIPT = """
import beside, os, sys
print(sys.argv, __name__, os.path.abspath(__file__), beside.here, os.getcwd(), os.environ.get("GIVEN"), sys.path[0], sys.stdin.read())
print("a word", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "sys.exit('it is wrong')", "os.kill(os.getpid(), 9)", "import atexit; atexit.register(print, 'at the end')"])
@pytest.mark.parametrize("unbuffered", ["", "1"])  # what is killed has said what was not in a buffer
def test_a_command_answers_as_in_its_own_interpreter(tmp_path, end, unbuffered):
    (tmp_path / "beside.py").write_text("here = 1")
    (tmp_path / "script.py").write_text(SCRIPT.format(end=end))
    asked = dict(cwd=tmp_path, env=os.environ | {"GIVEN": "x y", "PYTHONUNBUFFERED": unbuffered})
    theirs = subprocess.run([sys.executable, tmp_path / "script.py", "a b", "--c"], **asked, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    ours = forks.run(tmp_path / "script.py", "a b", "--c", **asked)
    named = subprocess.run([os.path.join(forks.named_python(), "python"), tmp_path / "script.py", "a b", "--c"], **asked, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    for answer in (ours, named):
        assert (answer.returncode, answer.stdout, answer.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_an_error_is_told_and_a_module_is_run(tmp_path):
    (tmp_path / "wrong.py").write_text("raise SystemError('too bad')")
    for command in (["wrong.py"], ["-m", "wrong"]):
        done = forks.run(*command, cwd=tmp_path)
        assert done.returncode == 1 and "SystemError: too bad" in done.stderr


def test_what_is_forked_has_the_libraries_and_nothing_of_the_repository(tmp_path):
    (tmp_path / "see.py").write_text("import sys\nprint(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'dvc', 'ept', 'execute', 'conftest'}))")
    assert forks.run("see.py", cwd=tmp_path).stdout == "['dvc', 'torch']\n"


def test_a_process_that_runs_can_be_ended(tmp_path):
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(1000)")
    process = forks.Process(["wait.py"], tmp_path, os.environ)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == process.poll() == -signal.SIGTERM
