"""Python commands in processes that are forked from one that has imported the big libraries, but nothing of this repository.

Importing PyTorch, transformers, DVC and the rest takes an interpreter up to five seconds. There are more than sixty notebooks to execute
that then work for one or two, and the tests of the pipeline give some hundred commands to miniatures of the repository. What is forked
has its own folder, environment, arguments and output, and imports the library that it finds there. A stage of DVC, which starts `python`
by its name, is forked where `named_python()` comes first on the path.
"""

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache

STEADY = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LIBRARIES = (
    "datasets",
    "distributed",
    "dvc.cli",
    "dvc.repo",
    "ipykernel.kernelapp",
    "matplotlib.figure",
    "nbclient",
    "nbdev.test",
    "papermill.execute",
    "scipy.stats",
    "sklearn.metrics",
    "torch",
    "transformers.models.auto",
    "transformers.models.gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.trainer",
)


@cache
def _server():
    "The socket on which the process that is forked is asked, and a folder with one for others; there is one such process for this one, and it ends with it."
    ours, theirs = socket.socketpair()
    folder = tempfile.mkdtemp(prefix="forks-", dir="/tmp")  # a socket's name has to be short
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("EPT_")}
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named:
        named.bind(os.path.join(folder, "asked"))
        sockets = [theirs.fileno(), named.fileno()]
        subprocess.Popen([sys.executable, __file__, *map(str, sockets)], env=environment | STEADY, stdin=subprocess.DEVNULL, pass_fds=sockets)
    return ours, folder


NAMED = """#!{python} -IS
import json, os, socket, struct, sys
asked, asking, status, told = *os.pipe(), *os.pipe()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
    server.connect({socket!r})
    socket.send_fds(server, [b"!"], [asked, 1, 2, told])
os.close(asked), os.close(told)
with open(asking, "w") as file:
    json.dump([sys.argv[1:], os.getcwd(), dict(os.environ)], file)
_, ended = os.read(status, 4), struct.unpack("i", os.read(status, 4))[0]
sys.exit(ended) if ended >= 0 else os.kill(os.getpid(), -ended)
"""


@cache
def named_python():
    "A folder with a command `python` that has its work done in a forked process, and ends as that one does; what kills it leaves that one alone."
    folder = _server()[1]
    file = os.path.join(folder, "python")
    with open(file, "w") as written:
        written.write(NAMED.format(python=sys.executable, socket=os.path.join(folder, "asked")))
    os.chmod(file, 0o755)
    return folder


class Process:
    "A command that has been started as `python command`; it has what others ask `subprocess.Popen` for."

    stdin = stdout = stderr = None

    def __init__(self, command, cwd, env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        self._status, theirs = os.pipe()
        with tempfile.TemporaryFile("w+") as asked, open(os.devnull, "w") as nothing:
            json.dump([list(map(str, command)), str(cwd), dict(env)], asked)
            asked.seek(0)
            streams = [nothing if stream is subprocess.DEVNULL else stream for stream in (stdout, stderr)]
            socket.send_fds(_server()[0], [b"!"], [file.fileno() for file in (asked, *streams)] + [theirs])
        os.close(theirs)
        self.pid, self.returncode = self._told(), None

    def _told(self):
        if not (told := os.read(self._status, 4)):
            raise RuntimeError("the process from which commands are forked has ended; on standard error it has said why")
        return struct.unpack("i", told)[0]

    def poll(self):
        "The exit status; None before the end."
        return self.wait() if self.returncode is not None or select.select([self._status], [], [], 0)[0] else None

    def wait(self):
        "The exit status, at the end."
        if self.returncode is None:
            self.returncode = self._told()
            os.close(self._status)
        return self.returncode

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def run(*command, cwd, env=os.environ):
    "What `subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)` gives."
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = Process(command, cwd, env, out, err).wait()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(command, status, *texts)


# ---- the process that is forked -----------------------------------------------------------------------------------------


def _open_streams(unbuffered):
    "Standard output and error anew, as an interpreter of its own has them: those of the process that was forked are wrapped by colorama, and buffered as it was told."
    for number, name in ((1, "stdout"), (2, "stderr")):
        was, raw = getattr(sys, f"__{name}__"), io.FileIO(number, "w", closefd=False)
        binary, by_line = raw if unbuffered else io.BufferedWriter(raw), name == "stderr" or raw.isatty()
        stream = io.TextIOWrapper(binary, was.encoding, was.errors, line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _become(command, folder, environment):
    "Run a command as `python command` does; its exit status."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _open_streams(bool(environment.get("PYTHONUNBUFFERED")))
    if backend := environment.get("MPLBACKEND"):  # of a notebook; matplotlib and pandas ask for it when they are imported
        sys.modules["matplotlib"].rcParams["backend"] = backend
        sys.modules["pandas"].options.display.max_columns = 20
    while command[0].startswith("-X"):
        del command[0]
    module = command[0] == "-m"
    script, arguments = (command[1], command[2:]) if module else (os.path.join(folder, command[0]), command[1:])
    sys.argv = [script, *arguments]
    sys.path[:0] = [folder if module else os.path.dirname(script), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        runpy.run_module(script, run_name="__main__", alter_sys=True) if module else runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _child(asked, streams):
    "What a forked process does; it does not return."
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(os.devnull) as nothing, open(asked) as file:
            command, folder, environment = json.load(file)
            for number, stream in enumerate((nothing.fileno(), *streams)):
                os.dup2(stream, number)
        status = _become(command, folder, environment | {"JPY_PARENT_PID": str(os.getppid())})
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # taking a process apart that has imported PyTorch takes a second


def _serve(*sockets):
    "Fork for who asks on a socket, and tell how each process has ended, until nobody is there to ask on the first."
    running = {}
    while True:
        if ready := select.select(sockets, [], [], 0.02 if running else None)[0]:
            word, descriptors, *_ = socket.recv_fds(ready[0], 1, 4)
            if not word:
                break
            asked, *streams, status = descriptors
            if not (child := os.fork()):
                for descriptor in (*(each.fileno() for each in sockets), status, *running.values()):
                    os.close(descriptor)
                _child(asked, streams)
            with suppress(BrokenPipeError):  # who has asked is gone
                os.write(status, struct.pack("i", child))
            running[child] = status
            for descriptor in (asked, *streams):
                os.close(descriptor)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with suppress(BrokenPipeError), open(running.pop(ended[0]), "wb") as status:
                status.write(struct.pack("i", os.waitstatus_to_exitcode(ended[1])))
    for child in running:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    del sys.path[0]  # the folder of this file is none of what is forked
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules["nbformat"].validate(sys.modules["nbformat"].v4.new_notebook())  # makes its validator
    with suppress(ImportError):  # what from_pretrained asks first compiles a thousand patterns
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("t5")
    gc.freeze()  # what is imported stays: a process's collections need not go over it, nor copy its pages
    asked = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    _serve(*asked)
    shutil.rmtree(os.path.dirname(asked[1].getsockname()), ignore_errors=True)
