"""A process that has imported the big libraries and forks a worker for each stage.

Importing PyTorch, transformers and the rest takes 3 to 5 seconds, and the embedded grid has 130 stages that then work for two
or less. `make reproduce` starts this process, and each stage's `run.py` hands over its arguments, its folder and its terminal, and
waits for the exit status. A worker does what `run.py` would have done without it, see stage.py. The library itself is not imported here
but for its fingerprints: a worker imports it as it is on the disk.

A worker lives no longer than the `run.py` that asked for it, and this process no longer than the one that started it.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path


def ask(address, arguments):
    "Have the arguments run by the process that listens at an address; the exit status, or None where nobody answers."
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
            sys.stdout.flush()
            socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(request)
            answer = connection.recv(16)
    except (OSError, AttributeError):  # nobody there, or a system without such sockets
        return None
    return int(answer) if answer else 1


def _read(connection, size):
    "Exactly so many bytes."
    content = b""
    while len(content) < size:
        if not (part := connection.recv(size - len(content))):
            raise EOFError
        content += part
    return content


def _work(connection):
    "In a worker: take over terminal and environment, run the stage, answer with the exit status."
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(_read(connection, int.from_bytes(size, "big")))
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    threading.Thread(target=lambda: connection.recv(1) or os._exit(137), daemon=True).start()  # the asker is gone
    import stage

    os.chdir(request["folder"])
    stage.prepare_process()
    return stage.main(request["arguments"])


def _fork(connection, listener):
    "Start a worker for one request."
    if os.fork():
        connection.close()
        return
    status = 1
    try:
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = _work(connection)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(str(status).encode())
        os._exit(status)


def serve(address):
    "Listen until standard input is closed."
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        _import()
        gc.freeze()  # what is imported stays: a worker's collections need not go over it, nor copy its pages
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if listener in ready:
                _fork(listener.accept()[0], listener)
            elif not os.read(sys.stdin.fileno(), 1):
                return


def _import():
    "What every stage would import, but for the library itself."
    import stage

    stage.prepare_process()
    import datasets  # noqa: F401
    import matplotlib.backends.backend_svg  # noqa: F401
    import pandas  # noqa: F401
    import papermill.execute  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration, Trainer  # noqa: F401

    import engine  # noqa: F401
    from ept.utils.fingerprints import code_version

    for module in ("ept.training.training", "ept.training.evaluation"):  # a file that changes later is read again
        code_version(module)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    serve(sys.argv[1])
