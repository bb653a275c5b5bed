"""What the processes of stages are forked from has imported this: the big libraries, but not the library of this repository.

Importing PyTorch, transformers and the rest takes 3 to 5 seconds, and the embedded grid has 130 stages that then work for two or
less. A stage imports the library as it is on the disk; here are only the fingerprints of its files, and a file that has changed is
read again.
"""

import gc
from contextlib import suppress

import stage

stage.prepare_process()

import datasets  # noqa: E402, F401
import matplotlib.backends.backend_svg  # noqa: E402, F401
import nbformat  # noqa: E402
import pandas  # noqa: E402, F401
import papermill.execute  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import torch  # noqa: E402, F401
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration, Trainer  # noqa: E402, F401

import engine  # noqa: E402, F401
from ept.utils.fingerprints import code_version  # noqa: E402

nbformat.validate(nbformat.v4.new_notebook())  # makes its validator
with suppress(ImportError):  # what from_pretrained asks first compiles a thousand patterns
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("t5")
for module in ("ept.training.training", "ept.training.evaluation"):
    code_version(module)
gc.freeze()  # what is imported stays: a stage's collections need not go over it, nor copy its pages
