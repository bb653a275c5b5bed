"""What transformers' Trainer offers beside plain training: parts of a batch, several processes, gradient checkpointing, early stopping, callbacks, trackers."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils

import forks
from ept.methods.registry import build_method
from ept.model.recomputation import gradient_checkpointing
from ept.training import training
from ept.training.batching import collate
from ept.training.trainer import PromptTrainer
from ept.training.training import train
from tests.conftest import tiny_backbone
from tests.processes import CONFIG, LAUNCHED, SIZES, TASK, make_data

ROOT = Path(__file__).resolve().parents[1]
STILL = replace(CONFIG, learning_rate=1e-30, pair_learning_rate=1e-30, module_learning_rate=1e-30, steps=20)  # no validation is better than the first


@pytest.fixture
def fit(tmp_path):
    """Train in a folder of this test, by name."""

    def run(name, backbone, training=CONFIG, method="ept", **options):
        return train(TASK, method, 0, backbone, make_data(), tmp_path / name, training=training, sizes=SIZES, progress=False, **options)

    return run


def weights(run):
    return load_file(run.adapter_dir / "adapter_model.safetensors")


def assert_close(run, other):
    """The same losses and the same adapter, but for rounding."""
    assert run.history.loss.dropna().tolist() == pytest.approx(other.history.loss.dropna().tolist(), rel=1e-4)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-2, atol=1e-3)


# ---- a batch in parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_in_parts_is_the_whole_batch(most, backbone, fit):
    whole, parts = fit("whole", backbone), fit("parts", backbone, replace(CONFIG, micro_batch_size=most))
    assert_close(whole, parts)
    assert weights(whole)["embeddings"].ne(weights(parts)["embeddings"]).any(), "they were not the same computation"


def test_parts_larger_than_the_batch_change_no_bit(fit):
    whole, same = (fit(str(most), tiny_backbone("llama"), replace(CONFIG, micro_batch_size=most)) for most in (0, 99))
    assert all(torch.equal(tensor, weights(same)[name]) for name, tensor in weights(whole).items())


def test_a_run_in_parts_that_is_stopped_ends_with_the_same_bits(fit, monkeypatch):
    config, steps, step = replace(CONFIG, micro_batch_size=1), [], PromptTrainer.training_step
    whole = fit("whole", tiny_backbone("t5"), config)

    def stopping(self, *args, **options):
        steps.append(self.state.global_step)
        if len(steps) == 4 * 3 + 2:
            raise InterruptedError
        return step(self, *args, **options)

    monkeypatch.setattr(PromptTrainer, "training_step", stopping)
    with pytest.raises(InterruptedError):
        fit("stopped", tiny_backbone("t5"), config)
    resumed = fit("stopped", tiny_backbone("t5"), config)
    assert steps[14:] == sorted([2, 3, 4, 5] * 4), "the second run goes on at the last checkpoint"
    assert all((whole.adapter_dir / name).read_bytes() == (resumed.adapter_dir / name).read_bytes() for name in ("adapter_model.safetensors", "history.csv"))


# ---- gradient checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ept", "attempt", "lora", "finetune"])
def test_gradient_checkpointing_changes_no_bit_and_keeps_less(method, backbone):
    """On a shared prefix, on a prompt that reads the text, and where the backbone itself is trained."""
    sources = {task: torch.randn(60, 32) for task in ("mnli", "qnli")}
    model = build_method(method, backbone.model, source_prompts=sources if method == "attempt" else None, **SIZES)
    batch = collate([[5, 6, 7] * 5, [8] * 20], [[2], [3, 4]], backbone.family, 0)

    def gradients(on):
        kept = []
        with gradient_checkpointing(model.backbone, on), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.train()(**batch, only_labelled=True).loss
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sum(kept)

    (plain, much), (again, little) = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(grad.abs().sum() > 0 for grad in plain.values()) and little < 0.7 * much


def test_a_run_with_gradient_checkpointing_is_the_same_run(backbone, fit, monkeypatch):
    within, step = [], PromptTrainer.training_step

    def counting(self, model, *args, **options):
        within.append(any("forward" in vars(module) for module in model.backbone.modules()))
        return step(self, model, *args, **options)

    monkeypatch.setattr(PromptTrainer, "training_step", counting)
    plain, again = fit("plain", backbone), fit("again", backbone, gradient_checkpointing=True)
    assert within == [False] * 6 + [True] * 6 and not any("forward" in vars(module) for module in backbone.model.modules())
    assert all((plain.adapter_dir / file.name).read_bytes() == file.read_bytes() for file in again.adapter_dir.iterdir())


# ---- when training ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience, last", [(0, 20), (1, 4), (3, 8)])
def test_training_ends_when_patience_does(patience, last, fit):
    run = fit("a", tiny_backbone("t5"), replace(STILL, early_stopping_patience=patience))
    assert run.history.step.max() == last and run.chosen_step == 2
    assert run.cost["examples_per_second"] * run.cost["train_seconds"] == pytest.approx(last * 4)


def test_a_run_that_was_killed_after_its_patience_trains_no_further(fit, monkeypatch):
    config = replace(STILL, early_stopping_patience=2)
    whole = fit("whole", tiny_backbone("t5"), config)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_write_run", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            fit("killed", tiny_backbone("t5"), config)
    monkeypatch.setattr(PromptTrainer, "training_step", lambda *_, **__: pytest.fail("a step more"))
    resumed = fit("killed", tiny_backbone("t5"), config)
    for name in ("adapter_model.safetensors", "training.json", "history.csv"):
        assert (whole.adapter_dir / name).read_bytes() == (resumed.adapter_dir / name).read_bytes(), name


def test_a_run_that_was_killed_keeps_count_of_its_patience(fit, monkeypatch):
    config, step = replace(STILL, early_stopping_patience=3), PromptTrainer.training_step

    def stopping(self, *args, **options):
        if self.state.global_step == 7:
            raise InterruptedError
        return step(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(PromptTrainer, "training_step", stopping)
        with pytest.raises(InterruptedError):
            fit("a", tiny_backbone("t5"), config)
    assert fit("a", tiny_backbone("t5"), config).history.step.max() == 8


class Watcher(TrainerCallback):
    """Keeps what it is told; ends training at a step."""

    def __init__(self, last=None):
        self.last, self.told = last, []

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append((state.global_step, sorted(logs)))

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.last


def test_callbacks_of_transformers_are_called(fit):
    watcher = Watcher(last=4)
    run = fit("a", tiny_backbone("t5"), callbacks=[watcher])
    assert run.history.step.max() == 4
    assert (0, "eval_score") in [(step, name) for step, names in watcher.told for name in names]
    assert any({"loss", "grad_norm", "learning_rate"} <= set(names) for _, names in watcher.told)
    run = fit("b", tiny_backbone("t5"), STILL, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
    assert run.history.step.max() == 6, "the Trainer's own callback does here what it does there"


def test_a_callback_that_ends_training_too_soon_is_told(fit, tmp_path):
    with pytest.raises(RuntimeError, match="a callback has ended training at step 1, before the first validation at step 2.*; let it wait, or lower evaluate_every"):
        fit("a", tiny_backbone("t5"), callbacks=[Watcher(last=1)])
    assert not (tmp_path / "a").exists()


# ---- trackers -------------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_the_history_holds(fit, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = fit("a", tiny_backbone("t5"), report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "a")).Reload()
    shown = {name: {event.step: event.value for event in events.Scalars(f"{part}/{name}")} for part, name in (("train", "loss"), ("eval", "score"), ("eval", "strength"))}
    kept = run.history.set_index("step")
    for name, values in shown.items():
        assert values == pytest.approx(kept[name].dropna().to_dict(), rel=1e-6)
    assert set(shown["score"]) == {0, 2, 4, 6}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_go_by_the_names_that_the_trainer_takes(name, fit, monkeypatch):
    """Neither is installed here: a stand-in takes the place that transformers has for it."""
    made = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, lambda: made.append(Watcher()) or made[-1])
    run = fit("a", tiny_backbone("t5"), report_to=[name])
    assert len(made) == 1 and {step for step, _ in made[0].told} == {*run.history.step}


def test_an_unknown_tracker_is_refused_before_anything_is_written(fit, tmp_path):
    with pytest.raises(ValueError, match="tensorbord is not supported, only .*tensorboard"):
        fit("a", tiny_backbone("t5"), report_to="tensorbord")
    assert not list(tmp_path.iterdir())


# ---- several processes ----------------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_does(fit, tmp_path):
    """In the environment that `accelerate launch` gives to each process; forked, since new interpreters take most of a launch's time."""
    done = forks.run("-m", "tests.processes", tmp_path / "two", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, method, most in LAUNCHED:
        name = f"{kind}-{method}-{most}"
        one = fit(f"one/{name}", tiny_backbone(kind), method=method)
        two = replace(one, adapter_dir=tmp_path / "two" / name, history=pd.read_csv(tmp_path / "two" / name / "history.csv"))
        assert_close(one, two)
        assert one.history.score.tolist() == pytest.approx(two.history.score.tolist(), nan_ok=True)
    stopped, whole = (tmp_path / "two" / name / "adapter_model.safetensors" for name in ("stopped", "t5-ept-0"))
    assert stopped.read_bytes() == whole.read_bytes(), "a run of two processes that was stopped ends with the bits of one that was not"
    assert "batch_size is 3, and 2 processes cannot share it equally; choose a multiple of 2" in done.stdout
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left == {f"{kind}-{method}-{most}" for kind, method, most in LAUNCHED} | {"stopped"}
