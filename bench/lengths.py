"""Count the token lengths of the 13 tasks: `python bench/lengths.py FOLDER`, where FOLDER holds the real rows as parquet.

Writes `bench/lengths.json`: for both ways of writing a task as text, how many of the first training rows have how many tokens.
The tokenizer is SmolLM2's, cut at 256 tokens; T5's vocabulary is of similar size, so lengths differ by a few percent. Only
counts are kept, no text.
"""

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, LONGEST = 2000, 256


def main(folder):
    sys.path.insert(0, str(ROOT))
    from ept import TASKS, load_backbone, load_task
    from ept.data.encoding import Encoder

    tokenizer, counts = load_backbone("smollm2").tokenizer, {"fields": {}, "question": {}}
    for task in TASKS:
        rows = load_task(task, "local", folder, subsample={"train": ROWS})["train"]
        for style, found in counts.items():
            lengths = Counter(map(len, Encoder(task, tokenizer, style, LONGEST).encode(rows)))
            found[task] = {str(length): lengths[length] for length in sorted(lengths)}
    text = json.dumps(counts).replace('}, "', '},\n"').replace('{"fields"', '{\n"fields"')
    (ROOT / "bench" / "lengths.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
