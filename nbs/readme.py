"""Write README.md, made from `nbs/index.ipynb`: its cells in order, links seen from the repository's root.

Two lines of the notebook stand for tables that are made anew each time, so that no number in them is typed by hand:
`<!-- methods -->` from the registry, `<!-- results: NAMES -->` from the results of the profiles named.
"""

import csv
import json
import re
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("index.ipynb")
ROOT = NOTEBOOK.parents[1]


def table(
    head,  # titles of the columns; one that ends in ":" is set to the right
    rows,  # lists of texts
):
    "A table in Markdown."
    rule = ["---:" if title.endswith(":") else "---" for title in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[title.removesuffix(":") for title in head], rule, *rows])


def methods_table():
    "Every method of the registry, ablations in two rows: what is trained, its source, and how many parameters that are on T5-base's shape."
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from ept.methods.catalogue import catalogue
    from ept.methods.registry import METHODS, method_table

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128, decoder_start_token_id=0)
    with torch.device("meta"):
        backbone = T5ForConditionalGeneration(config)
    counts = method_table(backbone)["parameters"]
    row = lambda m: [f"`{m.name}`", m.summary, m.source.split(",")[0].strip("- "), f"{counts[m.name]:,}"]
    rows = {m.name: row(m) for m in METHODS.values() if m.role != "ablation"}
    ablations = [m for m in METHODS.values() if m.role == "ablation"]
    parted = [m for m in ablations if catalogue().get(m.name) == catalogue()["ept"]]
    groups = {"EPT with one part taken away": parted, "[other readings](nbs/methods/31a_readings.ipynb) of the abstract; controls": [m for m in ablations if m not in parted]}
    bounds = lambda methods: " to ".join(f"{bound(counts[m.name] for m in methods):,}" for bound in (min, max))
    own = {said: [", ".join(f"`{m.name}`" for m in methods), said, "ablations", bounds(methods)] for said, methods in groups.items() if methods}
    rows = {"ept": rows.pop("ept"), **own, **rows}
    return table(["method", "what is trained", "source", "trainable parameters:"], rows.values())


def results_row(
    name,  # of a profile
):
    "What a profile's committed results say: its best method, `ept`, and how many methods `ept` is ahead of and behind."
    import yaml

    folder = ROOT if name == "embedded" else ROOT / "profiles" / name
    params = yaml.safe_load((folder / "params.yaml").read_text())
    origin = "made-up" if params["data"]["source"] == "embedded" else "real"
    report = folder / "results" / "report"
    if not report.exists():
        return [f"`{name}`", f"{len(params['tasks'])} {origin}", "–", "–", "–", "not run"]
    read = lambda file: list(csv.DictReader((report / file).open(encoding="utf-8")))
    means = {row["method"]: float(row["score"]) for row in read("tables/overall.csv") if row["score"]}  # of a grid that is not whole, those that are compared
    others = [row for row in read("tables/comparison.csv") if row["role"] == "comparison" and row["method"] in means]
    best = max(["ept", *(row["method"] for row in others)], key=means.get)
    sure = [float(row["difference"]) for row in others if float(row["bootstrap_holm"]) < 0.05]
    verdict = f"ahead of {sum(d > 0 for d in sure)}, behind {sum(d < 0 for d in sure)}, open {len(others) - len(sure)}"
    cells = read("table.csv")
    runs, there = sum(int(row["seeds"]) for row in cells), {(row["task"], row["method"]) for row in cells if row["seeds"] != "0"}
    shared = [task for task in params["tasks"] if all((task, row["method"]) in there for row in [{"method": "ept"}, *others])]
    tasks = f"{len(shared)} of {len(params['tasks'])} {origin}" if len(shared) < len(params["tasks"]) else f"{len(shared)} {origin}"
    link = f"[`{name}`]({(report / 'table.md').relative_to(ROOT).as_posix()})"
    return [link, tasks, str(runs), f"`{best}` {means[best]:.1f}", f"{means['ept']:.1f}", verdict]


def results_table(
    names,  # of profiles, in the order of the rows
):
    "A row for each profile."
    return table(["profile", "tasks", "runs:", "best method", "`ept`:", "`ept` against the others"], [results_row(name) for name in names])


def filled(text):
    "A text with its tables."
    text = re.sub(r"<!-- methods -->", lambda _: methods_table(), text)
    return re.sub(r"<!-- results: (.+?) -->", lambda found: results_table(found[1].split()), text)


def block(cell):
    "One cell as Markdown; directives and outputs are left out."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source = re.sub(r"\]\((?!\w+:|#|\.\./)([^)]+)\)", r"](nbs/\1)", source)
        return filled(re.sub(r"\]\(\.\./", "](", source))
    return "```python\n" + re.sub(r"(?m)^#\| .*\n", "", source) + "\n```"


def readme():
    "The whole page."
    return "\n\n".join(block(cell) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
