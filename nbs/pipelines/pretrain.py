"""Train a backbone anew: the embedded one, which goes to backbone/, or the multitask update of SmolLM2, which goes to updates/.

Everyone starts from those that come with the clone, since another processor trains other numbers. `make backbone` runs this and puts
the result into DVC's store. The update goes on at its last checkpoint when it was killed.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("embedded", "smollm2-multitask")


def train_embedded():
    "The tiny T5; mean losses of each tenth of its steps."
    from ept.training.pretraining import PretrainingConfig, pretrain

    return pretrain(PretrainingConfig(), ROOT / "backbone")


def train_multitask(name):
    "The update of SmolLM2; its losses and validation scores."
    from ept.data.loading import load_task
    from ept.model.backbone import load_backbone
    from ept.training.multitask import MultitaskConfig, train_update
    from ept.utils.settings import load_settings

    settings, config = load_settings(), MultitaskConfig()
    rows = {task: load_task(task, settings.data_source, settings.data_folder or None, part="backbone")["train"] for task in config.tasks}
    backbone = load_backbone(name.partition("-")[0], device=settings.device, precision=settings.precision)
    return train_update(backbone, rows, config, ROOT / "updates" / name, ROOT / "runs" / "checkpoints" / name)


def main(arguments=None):
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="embedded", choices=NAMES, help="which one (default: %(default)s)")
    name = parser.parse_args(arguments).name
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    history = train_embedded() if name == "embedded" else train_multitask(name)
    print(history.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
