"""The tests; what runs notebooks and forks processes for them is with the notebooks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nbs"))  # execute.py, forks.py
