"""What every command of the pipeline does first.

Ctrl-C ends it with one line that says how to go on, and with exit status 130.

A process in the middle of PyTorch or DVC has no place at which an exception could not be caught by others, or come out as pages of
their code. And there is nothing to tidy up: what is written is whole or not there, a lock ends with its process, and what was in the
making is swept by the next one. So the process ends at once, and those that it has started end with it.
"""

import marshal
import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def end_at_ctrl_c(then="the same command goes on from here"):
    "Have Ctrl-C end this process; `then` tells a person how to go on."

    def end(*_):
        os.write(2, f"\nstopped; {then}\n".encode())
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(130)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a command in the background
        signal.signal(signal.SIGINT, end)


def drop_damaged_bytecode(folders=(ROOT / "ept", ROOT / "nbs" / "pipelines")):
    "Remove what Python has compiled and cut off on a full disk, since older Pythons take it for whole and fail at it from then on; the files."
    compiled = f"__pycache__/*.{sys.implementation.cache_tag}.pyc"
    damaged = [file for folder in folders for file in Path(folder).rglob(compiled) if not _is_whole(file)]
    for file in damaged:
        file.unlink(missing_ok=True)
    return damaged


def _is_whole(file):
    "Whether a file of bytecode can be read to its end."
    try:
        marshal.loads(file.read_bytes()[16:])  # behind a header that Python checks by itself
    except (EOFError, ValueError, TypeError):
        return False
    except FileNotFoundError:  # another process has just replaced or removed it
        pass
    return True
