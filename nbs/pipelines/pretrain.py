"""Train a backbone anew: the embedded one, which goes to backbone/, or the multitask update of SmolLM2, which goes to updates/.

Everyone starts from those that come with the clone, since another processor trains other numbers. `make backbone` runs this and puts
the result into DVC's store. The update goes on at its last checkpoint when it was killed.
"""

import argparse
import os
import sys
from pathlib import Path

from command import end_at_ctrl_c

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("embedded", "smollm2-multitask")


def train_embedded():
    "The tiny T5; mean losses of each tenth of its steps."
    from ept.training.pretraining import PretrainingConfig, pretrain
    from ept.utils.locks import only_one

    with only_one(ROOT / ".dvc" / "tmp" / "coordinator", ROOT):
        return pretrain(PretrainingConfig(), ROOT / "backbone")


def train_multitask(name):
    "The update of SmolLM2; its losses and validation scores."
    from ept.data.loading import load_task
    from ept.model.backbone import load_backbone
    from ept.training.checkpoints import remove_checkpoints
    from ept.training.multitask import MultitaskConfig, train_update
    from ept.utils.settings import load_settings

    settings, config = load_settings(), MultitaskConfig()
    rows = {task: load_task(task, settings.data_source, settings.data_folder or None, part="backbone")["train"] for task in config.tasks}
    backbone = load_backbone(name.partition("-")[0], device=settings.device, precision=settings.precision)
    checkpoints = ROOT / "runs" / "checkpoints" / name
    run = train_update(backbone, rows, config, ROOT / "updates" / name, checkpoints)
    remove_checkpoints(checkpoints)
    return run.history


def main(arguments=None):
    "Command line; the exit status, or what was wrong."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="embedded", choices=NAMES, help="which one (default: %(default)s)")
    name = parser.parse_args(arguments).name
    end_at_ctrl_c(f"the same command {'begins anew' if name == 'embedded' else 'goes on from the last checkpoint'}")
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        history = train_embedded() if name == "embedded" else train_multitask(name)
    except RuntimeError as error:
        return f"error: {error}"
    print(history.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
