"""Count the token lengths of the 13 tasks: `python bench/lengths.py FOLDER`, where FOLDER holds the real rows as parquet.

Writes `bench/lengths.json`: how many of the first training rows have how many tokens, for both ways of writing a task as text with
SmolLM2's tokenizer, cut at 256 tokens. With `--t5 TOKENIZER`, a folder with that of T5, only the third entry is written: as the `paper`
profile cuts them. Only counts are kept, no text.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "bench" / "lengths.json"
ROWS, LONGEST = 2000, 256


def count(folder, tokenizer, style, longest):
    "Length -> number of rows, for each task; `longest` is the length at which a task's texts are cut."
    from ept import TASKS, load_task
    from ept.data.encoding import Encoder

    found = {}
    for task in TASKS:
        rows = load_task(task, "local", folder, subsample={"train": ROWS})["train"]
        lengths = Counter(map(len, Encoder(task, tokenizer, style, longest(task)).encode(rows)))
        found[task] = {str(length): lengths[length] for length in sorted(lengths)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of the rows: glue/<config>/<split>.parquet and super_glue/...")
    parser.add_argument("--t5", metavar="TOKENIZER", help="a folder with the tokenizer of T5: only the entry `t5` is written")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from transformers import AutoTokenizer

    from ept import load_backbone
    from ept.grid.profiles import load_profile

    counts = json.loads(FILE.read_text()) if FILE.exists() else {}
    if options.t5:
        paper = load_profile(ROOT / "profiles" / "paper" / "params.yaml")
        counts["t5"] = count(options.folder, AutoTokenizer.from_pretrained(options.t5), "fields", lambda task: paper.text(task)["max_length"])
    else:
        tokenizer = load_backbone("smollm2").tokenizer
        counts |= {style: count(options.folder, tokenizer, style, lambda task: LONGEST) for style in ("fields", "question")}
    text = json.dumps(counts).replace('}, "', '},\n"').replace('{"fields"', '{\n"fields"')
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
