"""Tables and the figure of a measurement: `python bench/show.py bench/results/NAME.json [--readme]`.

With `--readme` the tables also replace those in bench/README.md, and the figure is drawn beside the results.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {
    "peft-pt": "PEFT prompt tuning, as it comes",
    "peft-pt-tuned": "PEFT prompt tuning, tuned",
    "pt": "`pt`",
    "dept": "`dept`",
    "ept": "`ept`",
    "ept@float32": "`ept`, float32",
    "frozen": "no prompt",
}
SHAPES = {"t5-base": "T5-base", "smollm2": "SmolLM2-135M", "tiny": "a tiny T5"}


def precision(name, machine):
    "The number format in which a contender multiplies."
    half = machine["device"] == "cuda" or {"avx512_bf16", "amx_bf16"} & set(machine["processor"]["flags"])
    return "float32" if name in ("peft-pt", "ept@float32") or not half else "bfloat16"


def table(head, rows):
    "Rows of texts as Markdown."
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cell(found, base):
    "A time, its spread, and its share of the baseline's."
    half = 50 * (found["high"] - found["low"]) / found["median"]
    return f"{found['median']:.3f} ± {half:.0f} % ({found['median'] / base['median']:.2f})"


def training_table(shape, machine):
    first = shape["train"]["peft-pt"]
    lengths = list(first["step_seconds"])
    head = ["contender", "numbers", *(f"L = {n}" for n in lengths), "peak memory", "share of the matrix rate", "start"]
    rows = []
    for name, found in shape["train"].items():
        kind = precision(name, machine)
        share = lambda n, found=found, kind=kind: found["operations"][n] / found["step_seconds"][n]["median"] / shape["rates"][kind]
        rows.append(
            [
                NAMES[name],
                kind,
                *(cell(found["step_seconds"][n], first["step_seconds"][n]) for n in lengths),
                f"{found['peak_bytes']['median'] / 1e9:.2f} GB ({found['peak_bytes']['median'] / first['peak_bytes']['median']:.2f})",
                ", ".join(f"{100 * share(n):.0f} %" for n in lengths),
                f"{found['start_seconds']['median']:.1f} s",
            ]
        )
    return table(head, rows)


def scoring_table(shape, machine):
    first = shape["score"]["peft-pt"]
    fold = lambda name: ", folded" if name in ("dept", "ept") else ""
    rows = [[NAMES[n] + fold(n), precision(n, machine), *(cell(found[k], first[k]) for k in found)] for n, found in shape["score"].items()]
    return table(["contender", "numbers", *(f"L = {n}" for n in first)], rows)


def task_table(shape):
    found = shape["per_1000_examples"]
    tasks = list(next(iter(found.values())))
    rows = [[task, *(f"{found[n][task]:.0f}" for n in found)] for task in tasks]
    return table(["task", *(NAMES[n] for n in found)], rows)


def stream_table(shape):
    found = shape["streams"]
    names = list(next(iter(found.values())))
    both = lambda task, n: f"{found[task][n]:.0f} ({shape['per_1000_examples'][n][task]:.0f})"
    return table(["task", *(NAMES[n] for n in names)], [[task, *(both(task, n) for n in names)] for task in found])


def show(file):
    "All tables of a result file, Markdown."
    result = json.loads(Path(file).read_text())
    machine, parts = result["machine"], []
    flags = ", ".join(machine["processor"]["flags"])
    where = f"{machine['threads']} threads of {machine['processor']['name']} ({flags})" if machine["device"] == "cpu" else machine["device"]
    parts.append(f"Measured on {result['date']}: {where}, PyTorch {machine['torch']}.")
    for name, shape in result["shapes"].items():
        rates = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {kind}" for kind, rate in shape["rates"].items())
        parts += [f"### {SHAPES[name]}, batches of {shape['batch_size']}", f"Matrix products of the machine, measured in the same run: {rates}."]
        parts += ["Seconds of a training step:", training_table(shape, machine)]
        alone = ", ".join(f"{NAMES[n]} {1000 * s['median']:.2f} ms" for n, s in shape["prompt_seconds"].items())
        share = (shape["prompt_seconds"]["ept"]["median"] - shape["prompt_seconds"]["dept"]["median"]) / next(iter(shape["train"]["dept"]["step_seconds"].values()))["median"]
        parts.append(f"Of a step, what the prompt itself takes, forward and backward: {alone}. Fusion and projection are {100 * share:.1f} % of the shortest step of `dept`.")
        parts += ["Seconds to score a batch:", scoring_table(shape, machine)]
        parts += ["Seconds of 1,000 training examples, from the step times and the batches each contender forms of the task's lengths:", task_table(shape)]
        if shape["streams"]:
            parts += ["The same, run: 64 examples in the contender's own batches (in brackets: as computed above):", stream_table(shape)]
    return "\n\n".join(parts) + "\n"


def draw(file):
    "Step times by length, and memory, as SVG beside the result file."
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot as plt

    result = json.loads(Path(file).read_text())
    colours = dict(zip(NAMES, ("#000000", "#999999", "#0072B2", "#56B4E9", "#D55E00", "#E69F00")))
    markers = dict(zip(NAMES, "osD^vX"))
    figure, axes = plt.subplots(len(result["shapes"]), 2, figsize=(11, 4 * len(result["shapes"])), squeeze=False, width_ratios=[3, 2], layout="constrained")
    for (left, right), (name, shape) in zip(axes, result["shapes"].items()):
        trained = shape["train"]
        for contender, found in trained.items():
            lengths = [int(n) for n in found["step_seconds"]]
            medians = [s["median"] for s in found["step_seconds"].values()]
            left.plot(lengths, medians, color=colours[contender], marker=markers[contender], label=NAMES[contender].replace("`", ""))
        left.set(xscale="log", yscale="log", xlabel="tokens of a text", ylabel="seconds of a training step", title=f"{SHAPES[name]}, batches of {shape['batch_size']}")
        left.set_ylim(top=6 * left.get_ylim()[1])  # room for the legend
        left.set_xticks(lengths, lengths)
        left.minorticks_off()
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if left.get_ylim()[0] <= t <= left.get_ylim()[1]]
        left.set_yticks(ticks, ticks)
        left.grid(alpha=0.3)
        left.legend(frameon=False, fontsize=8)
        labels = [NAMES[c].replace("`", "") for c in trained]
        sizes = [f["peak_bytes"]["median"] / 1e9 for f in trained.values()]
        right.barh(labels, sizes, color=[colours[c] for c in trained])
        right.bar_label(right.containers[0], fmt="%.1f", padding=3)
        right.invert_yaxis()
        right.set(xlabel="peak memory of training, GB")
        right.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(file).with_suffix(".svg"), metadata={"Date": None})


def replace_part(page, name, text):
    "Put a text between the two comments of a page that bear a name."
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text().split(start)
    page.write_text(f"{before}{start}\n\n{text}\n{end}{rest.split(end)[1]}")


def keep(found, file, part, text):
    "Write a result to a file, put what it says into that part of bench/README.md, and print it."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    replace_part(HERE / "README.md", part, text)
    print(text)


def main(arguments):
    file = Path(arguments[0])
    print(show(file))
    if "--readme" in arguments:  # the figure and the tables of one machine
        draw(file)
        replace_part(HERE / "README.md", "results", f"![step times and memory](results/{file.stem}.svg)\n\n{show(file)}")


if __name__ == "__main__":
    main(sys.argv[1:])
