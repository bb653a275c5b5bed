"""Efficient prompt tuning by multi-space projection and prompt fusion, for frozen language models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of `_HOMES` once more, for editors and type checkers, which do not run `__getattr__`
    from .data.loading import load_task as load_task
    from .data.task_files import read_task as read_task
    from .data.tasks import TASKS as TASKS
    from .data.tasks import Task as Task
    from .data.tasks import get_task as get_task
    from .methods.registry import METHODS as METHODS
    from .methods.registry import Method as Method
    from .methods.registry import build_method as build_method
    from .methods.registry import register as register
    from .model.backbone import Backbone as Backbone
    from .model.backbone import load_backbone as load_backbone
    from .model.bank import PromptBank as PromptBank
    from .model.modeling import EPTModel as EPTModel
    from .model.serving import encode_embeds as encode_embeds
    from .model.serving import prompt_embeds as prompt_embeds
    from .prompt.soft import EPTConfig as EPTConfig
    from .training.config import TrainingConfig as TrainingConfig
    from .training.distillation import share_prompt as share_prompt
    from .training.evaluation import Evaluation as Evaluation
    from .training.evaluation import evaluate as evaluate
    from .training.training import Run as Run
    from .training.training import train as train
    from .use.classifier import Classifier as Classifier
    from .use.comparing import compare as compare
    from .use.pipelines import generation_pipeline as generation_pipeline
    from .use.publishing import push_to_hub as push_to_hub
    from .use.records import describe as describe
    from .use.records import save_evaluation as save_evaluation
    from .use.tables import task_of_table as task_of_table

__version__ = "0.0.1"

_HOMES = {
    "data.tasks": ("TASKS", "Task", "get_task"),
    "data.task_files": ("read_task",),
    "data.loading": ("load_task",),
    "prompt.soft": ("EPTConfig",),
    "model.backbone": ("Backbone", "load_backbone"),
    "model.modeling": ("EPTModel",),
    "model.serving": ("encode_embeds", "prompt_embeds"),
    "model.bank": ("PromptBank",),
    "methods.registry": ("METHODS", "Method", "build_method", "register"),
    "training.config": ("TrainingConfig",),
    "training.training": ("Run", "train"),
    "training.evaluation": ("Evaluation", "evaluate"),
    "training.distillation": ("share_prompt",),
    "use.classifier": ("Classifier",),
    "use.pipelines": ("generation_pipeline",),
    "use.tables": ("task_of_table",),
    "use.records": ("describe", "save_evaluation"),
    "use.comparing": ("compare",),
    "use.publishing": ("push_to_hub",),
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
