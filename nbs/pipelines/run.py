"""Run one notebook of the pipeline: `python nbs/pipelines/run.py train --task cola --method ept --seed 0`.

It is run in the folder of a profile; from elsewhere `--profile-file profiles/smollm2/params.yaml` says which one is meant. Where
`make reproduce` keeps a process warm (see warm.py), the work is done there, else here (see stage.py).
"""

import os
import sys

if __name__ == "__main__":
    if address := os.environ.get("EPT_WARM"):
        from warm import ask

        if (status := ask(address, sys.argv[1:])) is not None:
            sys.exit(status)
    from stage import main, prepare_process

    prepare_process()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is written; taking a process apart that has imported PyTorch costs a second
