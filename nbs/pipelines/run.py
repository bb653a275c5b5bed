"""Run one notebook of the pipeline: `python nbs/pipelines/run.py train --task cola --method ept --seed 0`.

It is run in the folder of a profile; from elsewhere `--profile-file profiles/smollm2-plain/params.yaml` says which one is meant.
"""

import os
import sys

from command import drop_damaged_bytecode, end_at_ctrl_c
from stage import main, prepare_process

if __name__ == "__main__":
    end_at_ctrl_c("the same command goes on from the last checkpoint, or begins anew where there is none")
    prepare_process()
    status = 1
    try:
        status = main(sys.argv[1:])
    finally:
        if status and drop_damaged_bytecode():
            print("a full disk had cut off what Python compiles; that is removed, and the same command goes on from here", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is written; taking a process apart that has imported PyTorch costs a second
