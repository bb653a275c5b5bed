"""Efficient prompt tuning by multi-space projection and prompt fusion, for frozen language models."""

from importlib import import_module

__version__ = "0.0.1"

_HOMES = {
    "data.tasks": ("TASKS", "Task", "get_task"),
    "data.task_files": ("read_task",),
    "data.loading": ("load_task",),
    "prompt.soft": ("EPTConfig",),
    "model.backbone": ("Backbone", "load_backbone"),
    "model.modeling": ("EPTModel",),
    "methods.registry": ("METHODS", "build_method"),
    "training.config": ("TrainingConfig",),
    "training.training": ("Run", "train"),
    "training.evaluation": ("Evaluation", "evaluate"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name):
    "Import a public name when it is first asked for: `import ept` stays quick, and a light module pulls in no heavy one."
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ept' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"ept.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
