"""The tests; what runs notebooks and forks processes for them is with the notebooks, what the commands of the pipeline do is beside those."""

import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "pipelines")]
