"""Mend what a command of DVC that was killed has cut off: `python nbs/pipelines/mend.py`, in the folder of a profile.

`make mend` runs this, `make reproduce` and `make status` do it first.
"""

import sys
from pathlib import Path

from command import end_at_ctrl_c

ROOT = Path(__file__).resolve().parents[2]


def mend(folder):
    "Mend the lock files of a profile and DVC's list of those at work; a line for each that was cut off."
    from dvc.repo import Repo

    from ept.workflow.mending import mend_locks, mend_rwlock

    said = mend_rwlock(folder)
    with Repo(str(folder), _wait_for_lock=True).lock:  # nobody writes one
        return said + mend_locks(folder)


if __name__ == "__main__":
    end_at_ctrl_c()
    sys.path.insert(0, str(ROOT))
    for line in mend(Path.cwd()):
        print(line)
