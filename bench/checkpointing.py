"""What gradient checkpointing saves: `python bench/checkpointing.py` measures a training step with it and without, each in a process of its own.

The backbone has the shape of SmolLM2-135M and random weights; the prompt is that of `ept`. What is found, and on what, goes to
bench/results/checkpointing/NAME.json and into bench/README.md. Memory is the peak of the process (of the GPU, where there is one) in a step, less what
was held before it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import contender
from show import keep, replace_part

RESULTS = Path(__file__).parent / "results" / "checkpointing"
PAGE = Path(__file__).parent / "README.md"


def measure(job):
    "Peak memory of one training step beyond what is held before it, bytes; and the loss and the size of the prompt's gradient."
    import torch

    from ept.model.recomputation import gradient_checkpointing
    from ept.training.batching import collate

    torch.manual_seed(0)
    model = contender.our_model(job["folder"], "ept", job["precision"]).train()
    pairs = contender.texts(contender.VOCABULARY[job["shape"]], [job["length"]] * job["batch_size"])
    batch = {name: rows.to(model.backbone.device) for name, rows in collate(*map(list, zip(*pairs)), model.family, 0).items()}
    for weight in model.parameters():
        weight.sum()  # weights are mapped from their file, and take memory when they are first used
    with gradient_checkpointing(model.backbone, job["checkpointing"]):
        contender.forget_peak()
        before = contender.peak_bytes()
        loss = model(**batch, only_labelled=True).loss
        loss.backward()
        after = contender.peak_bytes()
    return {"step_bytes": after - before, "held_bytes": before, "loss": loss.item(), "gradient": model.prompt.embeddings.grad.norm().item()}


def run(job):
    "A measurement in a process of its own."
    done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measurement of {job} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(found):
    "What was found, as Markdown."
    lines = [
        f"Measured on {found['date']}: {found['device']}, PyTorch {found['torch']}; {found['shape']} shape, batches of {found['batch_size']}, {found['precision']}.",
        "",
        "| tokens of each text | memory of a step | with gradient checkpointing | share | loss and gradient |",
        "|---:|---:|---:|---:|---|",
    ]
    for length in sorted({step["length"] for step in found["steps"]}):
        off, on = sorted((step for step in found["steps"] if step["length"] == length), key=lambda step: step["checkpointing"])
        same = "the same" if (off["loss"], off["gradient"]) == (on["loss"], on["gradient"]) else "differ"
        sizes = [step["step_bytes"] / 1e9 for step in (off, on)]
        lines.append(f"| {length} | {sizes[0]:.2f} GB | {sizes[1]:.2f} GB | {sizes[1] / sizes[0]:.2f} | {same} |")
    return "\n".join(lines) + "\n"


def device():
    "The name of the GPU; or of the processor, with the number of threads."
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from bench import processor

    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()['name']}"


def main():
    "All measurements, one after another."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="this-machine", help="of the file in bench/results/checkpointing")
    parser.add_argument("--shape", default="smollm2", choices=["smollm2", "t5-base", "tiny"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256], help="tokens of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--show", type=Path, help="measure nothing, put this result into bench/README.md")
    parser.add_argument("--job", help="one measurement, as JSON; used by the program itself")
    chosen = parser.parse_args()
    if chosen.job:
        return print(json.dumps(measure(json.loads(chosen.job))))
    if chosen.show:
        return replace_part(PAGE, "checkpointing", show(json.loads(chosen.show.read_text())))
    setting = {name: getattr(chosen, name) for name in ("shape", "batch_size", "precision")}
    found = {"date": str(date.today()), "device": device(), "torch": version("torch"), **setting, "steps": []}
    with tempfile.TemporaryDirectory() as folder:
        contender.backbone({"shape": chosen.shape, "folder": folder})
        for length in chosen.lengths:
            for on in (False, True):
                job = {"shape": chosen.shape, "folder": folder, "length": length, "batch_size": chosen.batch_size, "precision": chosen.precision, "checkpointing": on}
                found["steps"].append({"length": length, "checkpointing": on, **run(job)})
                last = found["steps"][-1]
                print(f"L = {length}, gradient checkpointing {'on ' if on else 'off'}: {last['step_bytes'] / 1e9:.2f} GB a step, loss {last['loss']:.6f}", flush=True)
    return keep(found, RESULTS / f"{chosen.name}.json", "checkpointing", show(found))


if __name__ == "__main__":
    main()
