"""Train the embedded backbone anew: `python nbs/pipelines/pretrain.py` writes backbone/.

Everyone starts from the one that comes with the clone, since another processor trains another model. `make backbone` runs this and
puts the result into DVC's store.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ept.training.pretraining import PretrainingConfig, pretrain

    print(pretrain(PretrainingConfig(), ROOT / "backbone").round(3).to_string(index=False))
