"""`python -m tests.processes FOLDER` trains in two processes on a CPU, in the environment that `accelerate launch` gives to each."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from ept.data.tasks import Task
from ept.training import trainer, training
from ept.training.config import TrainingConfig
from ept.training.training import train
from tests.conftest import tiny_backbone

SIZES = dict(prompt_length=60, short_length=8, max_length=48, spaces=2, space_width=1, fusion_width=1, adapter_width=3, lora_rank=2)
TASK = Task("colour", ("text",), ("no", "certainly"), ("accuracy",))  # labels of different lengths: parts of a batch do not weigh the same
CONFIG = TrainingConfig(steps=6, batch_size=4, evaluate_every=2, learning_rate=0.1, pair_learning_rate=0.01, module_learning_rate=0.01)
LAUNCHED = [("t5", "ept", 0), ("llama", "ept", 1), ("llama", "lora", 0)]  # backbone, method, micro_batch_size
WRITING = {trainer: ("seal_checkpoint", "thin_checkpoints"), training: ("last_checkpoint", "hold_checkpoints", "remove_checkpoints", "whole_folder")}


def make_data():
    rows = [{"text": f"{word} {n}", "label": int(word == "red")} for n in range(8) for word in ("red", "blue")]
    return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})


class Stopping(TrainerCallback):
    """Stands for a job that is killed: every process fails at once."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise InterruptedError


def launched(folder):
    """What each of the processes does; only the first one may write."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    for module, names in WRITING.items() if not state.is_main_process else ():
        for name in names:
            setattr(module, name, None)

    def fit(name, kind, training=CONFIG, method="ept", **options):
        run = train(TASK, method, 0, tiny_backbone(kind), make_data(), folder / name, training=training, sizes=SIZES, progress=False, **options)
        assert (run.adapter_dir / "adapter_model.safetensors").exists(), "it is there when `train` returns, in every process"

    for kind, method, most in LAUNCHED:
        fit(f"{kind}-{method}-{most}", kind, replace(CONFIG, micro_batch_size=most), method)
    with pytest.raises(InterruptedError):
        fit("stopped", "t5", callbacks=[Stopping()])
    fit("stopped", "t5")
    with pytest.raises(ValueError) as refused:
        fit("odd", "t5", replace(CONFIG, batch_size=3))
    print(refused.value)


if __name__ == "__main__":
    debug_launcher(launched, (Path(sys.argv[1]),))
