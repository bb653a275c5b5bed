"""The tests; what runs notebooks and forks processes for them is with the notebooks, the commands of the pipeline are beside those, and measurements in bench/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("nbs", "nbs/pipelines", "bench")]
