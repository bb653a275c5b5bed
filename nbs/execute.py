"""Execute the notebooks of the library, and compare what they show with what is committed, or keep it.

    python nbs/execute.py                          # compare, as tests/test_notebooks.py does
    python nbs/execute.py --write                  # keep: `make outputs`
    python nbs/execute.py nbs/prompt nbs/utils/00_checking.ipynb

A reader sees values, tables and pictures without running anything, and `make test` sees that they are still true. Each notebook has a
kernel of its own, in its own folder, with one thread and neither network nor progress bars. Text has to be the same; numbers with a
fraction may differ by a hundredth or by one in their last digit, since another processor adds in another order; pictures have to be there in
about the same size. What libraries say on standard error is not kept.

nbdev's directives keep their meaning: a cell with `eval: false` or a flag of `tst_flags` in pyproject.toml, such as `slow`, is not executed and keeps
its outputs (`--flags slow` executes it); what a cell with `hide` shows is nobody's business. The notebooks of the pipeline are templates and
have no outputs.
"""

import argparse
import asyncio
import io
import math
import os
import re
import struct
import sys
import time
from base64 import b64decode, b64encode
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb, nbdev_clean
from nbdev.config import get_config
from nbdev.test import nb_test_cells
from PIL import Image

import forks

ROOT = Path(__file__).resolve().parents[1]
NOT_EXECUTED = ("pipelines", ".ipynb_checkpoints")  # folders
CELL_SECONDS = 600
FEW = 2  # notebooks; for more of them it pays to import the big libraries once
TEXTS, PICTURES = ("text/plain", "text/markdown", "text/html", "text/latex"), ("image/png", "image/svg+xml")
TOLERANCE = 0.01  # of a number with a fraction, relative
SMALLEST = 1e-5  # below it, a number with a fraction is zero
SCALE = 0.15  # by which the sides of a picture may differ, relative
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
VOLATILE = {  # what no output may hold, for it is another one each time, or on each machine
    "an address in memory": re.compile(r"\b0x[0-9a-f]{6,}"),
    "a path of this machine": re.compile(r"(?<![\w.~])/(?:home|root|tmp|usr|var|opt|mnt|private|Users|work)/[\w.~-]+|\b[A-Z]:\\\w+"),
    "the name of a temporary file": re.compile(r"\btmp[a-z0-9_]{8}\b"),
    "a time": re.compile(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d|\b\d\d:\d\d:\d\d\b|\b\d+(?:\.\d+)? ?(?:s|ms|min|seconds|minutes) \[|\bit/s\b|\bs/it\b"),
    "a progress bar": re.compile(r"\d+%\|"),
    "a warning": re.compile(r"\w+Warning\b: "),
}
KERNEL = (  # no word about its own connection; pictures small, and without the version of what drew them
    "--log-level=40",
    "--InlineBackend.print_figure_kwargs={'bbox_inches': 'tight', 'dpi': 80, 'metadata': {'Software': None}}",
)


def environment():
    "The environment of a kernel: this clone's library, no setting of the person, nothing that moves on the screen."
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EPT_")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # what a kernel chooses by itself, if it is the first to import matplotlib
    return {**kept, "PYTHONPATH": path, **forks.STEADY, **quiet, **inline}


class Forked(LocalProvisioner):
    "Starts a kernel as a fork, where `LocalProvisioner` starts an interpreter."

    async def launch_kernel(self, cmd, **options):
        self.process = forks.Process(cmd[1:], options["cwd"], options["env"])
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class ForkedKernel(AsyncKernelManager):
    "The manager of a kernel that is forked from a process with the big libraries; see forks.py."

    def __init__(self, **options):
        super().__init__(**options)
        self.provisioner = Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)


# ---- executing ----------------------------------------------------------------------------------------------------------


def shown(outputs):
    "What a reader is to see of a cell's outputs: values, tables, pictures, printed text."
    kept = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=output.text))
        elif output.output_type in ("execute_result", "display_data") and not any("widget" in kind for kind in output.data):
            data = {kind: output.data[kind] for kind in (*TEXTS, *PICTURES) if kind in output.data}
            if picture := data.get("image/png"):
                data["image/png"] = with_a_palette(picture)
            kept.append(nbformat.v4.new_output(output.output_type, data))
    return kept


def with_a_palette(png):
    "A picture in 256 colours, as base64: a figure looks the same and takes a third of the bytes."
    small, picture = io.BytesIO(), Image.open(io.BytesIO(b64decode(png)))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return b64encode(small.getvalue()).decode()


async def execute(path, flags=(), kernel=AsyncKernelManager):
    "A notebook with the outputs of a fresh run; and the identifiers of the cells that were executed, for their outputs to be compared."
    notebook = nbformat.read(path, as_version=4)
    config = get_config(path)
    skipped = config.tst_flags
    cells = {cell.id: cell for cell in nb_test_cells(path, skipped.split() if isinstance(skipped, str) else skipped, flags)}
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        kernel_manager_class=kernel,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
        extra_arguments=list(KERNEL),
    )
    async with client.async_setup_kernel(env=environment()):
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code" and cell.id in cells:
                await client.async_execute_cell(cell, number)
                cell.outputs = [] if "hide" in cells[cell.id].directives_ else shown(cell.outputs)
    clean_nb(notebook, **{key: config.get(key) for key in ("allowed_metadata_keys", "allowed_cell_metadata_keys", "allowed_out_metadata_keys")})
    return notebook, set(cells)


# ---- comparing ----------------------------------------------------------------------------------------------------------


def same_number(was, now):
    "Whether two written numbers are the same: whole ones exactly, others within the tolerance or one in the last digit of either."
    fractions = [place for text in (was, now) if (place := Decimal(text).as_tuple().exponent) < 0]
    if not fractions:
        return Decimal(was) == Decimal(now)
    return math.isclose(float(was), float(now), rel_tol=TOLERANCE, abs_tol=max(SMALLEST, 1.001 * 10.0 ** max(fractions)))


def same_text(was, now):
    "Whether two texts say the same, whatever the spaces in them."
    words = [[re.sub(r"\s+", " ", part).strip() for part in NUMBER.split(text)] for text in (was, now)]
    return words[0] == words[1] and all(same_number(*pair) for pair in zip(NUMBER.findall(was), NUMBER.findall(now)))


def picture_size(kind, data):
    "Width and height of a picture, in its own unit; `ValueError` where it does not say."
    if kind == "image/png":
        head = b64decode(data[:64])
        if head[12:16] == b"IHDR":
            return struct.unpack(">II", head[16:24])
    elif found := re.search(r'<svg[^>]*?\bviewBox="[-\d.]+ [-\d.]+ ([\d.]+) ([\d.]+)"', data):
        return float(found[1]), float(found[2])
    raise ValueError(f"a picture of type {kind} that does not say its size")


def parts(outputs):
    "Kind and content of everything that a cell shows, in order."
    for output in outputs:
        if output.output_type == "stream":
            yield "text/plain", output.text
        else:
            yield from sorted(output.get("data", {}).items())


def part_difference(kind, was, now):
    "How two contents of the same kind differ, in words; None where they do not."
    if kind in PICTURES:
        sizes = picture_size(kind, was), picture_size(kind, now)
        if all(math.isclose(*sides, rel_tol=SCALE) for sides in zip(*sizes)):
            return None
        return "the picture was {:g} x {:g} and is now {:g} x {:g}".format(*sizes[0], *sizes[1])
    if same_text(was, now):
        return None
    lines = zip_longest(was.strip().splitlines(), now.strip().splitlines(), fillvalue="")
    return "was  {}\n    now  {}".format(*next(((a.strip(), b.strip()) for a, b in lines if not same_text(a, b)), (was, now)))


def cell_difference(was, now):
    "How the outputs of a cell differ from those of before, in words; None where they do not."
    was, now = list(parts(was)), list(parts(now))
    kinds = [[kind for kind, _ in each] for each in (was, now)]
    if kinds[0] != kinds[1]:
        return "showed {} and shows now {}".format(*(", ".join(each) or "nothing" for each in kinds))
    return next((found for (kind, a), (_, b) in zip(was, now) if (found := part_difference(kind, a, b))), None)


def differences(was, now, executed):
    "Where two states of a notebook show something else: a sentence for each of the executed cells that does."
    before = {cell.id: cell.get("outputs", []) for cell in was.cells}
    found = []
    for number, cell in enumerate(now.cells):
        if cell.id in executed and (difference := cell_difference(before.get(cell.id, []), cell.outputs)):
            found.append(f"cell {number} ({cell.id}), {first_line(cell)}:\n    {difference}")
    return found


def first_line(cell):
    "The first line of code in a cell, to know it again."
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
    return repr(lines[0][:80]) if lines else "empty"


def volatile(notebook):
    "What in the outputs of a notebook would be another on the next day or on the next machine: a sentence for each."
    found = []
    for number, cell in enumerate(notebook.cells):
        texts = [text for kind, text in parts(cell.get("outputs", [])) if kind not in PICTURES]
        for what, pattern in VOLATILE.items():
            if hit := next(filter(None, map(pattern.search, texts)), None):
                found.append(f"cell {number} ({cell.id}), {first_line(cell)}:\n    shows {what}: {hit[0]!r}; show something else, or end the line with a semicolon")
    return found


# ---- the command --------------------------------------------------------------------------------------------------------


def find(paths):
    "The notebooks at some paths, those of the pipeline left out; `FileNotFoundError` where there is none."
    found = []
    for path in map(Path, paths):
        found += [path] if path.suffix == ".ipynb" else sorted(path.rglob("*.ipynb"))
    found = [path.resolve() for path in found if path.is_file() and path.parent.name not in NOT_EXECUTED]
    if not found:
        raise FileNotFoundError(f"no notebook to execute in {', '.join(map(str, paths))}; give folders or .ipynb files of the library")
    return found


async def treat(path, write, flags, kernel):
    "Execute one notebook, then write or compare it; what is wrong, a sentence each."
    try:
        fresh, executed = await execute(path, flags, kernel)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()]
    if found := volatile(fresh):
        return found
    if not write:
        return differences(nbformat.read(path, as_version=4), fresh, executed)
    nbformat.write(fresh, path)
    nbdev_clean(str(path))  # nbdev's own form, so that `make export` finds nothing to do
    return []


async def treat_all(paths, write, flags, jobs):
    "All notebooks, some at a time, with a line for each; how many are not as they should be."
    free, wrong = asyncio.Semaphore(jobs), 0
    kernel = ForkedKernel if len(paths) > FEW else AsyncKernelManager

    async def one(path):
        nonlocal wrong
        async with free:
            begun = time.monotonic()
            found = await treat(path, write, flags, kernel)
        wrong += bool(found)
        print(f"{os.path.relpath(path)}: {time.monotonic() - begun:.0f} s{', FAILED' if found else ''}", flush=True)
        for sentence in found:
            print(f"  {sentence}", flush=True)

    await asyncio.gather(*map(one, paths))
    return wrong


def main(arguments=None):
    "Command line; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=[ROOT / "nbs"], help="folders or notebooks; all of nbs/ without any")
    parser.add_argument("--write", action="store_true", help="keep the outputs instead of comparing them")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    parser.add_argument("--flags", nargs="*", default=(), help="execute cells with these flags too, such as slow")
    chosen = parser.parse_args(arguments)
    try:
        wrong = asyncio.run(treat_all(find(chosen.paths), chosen.write, chosen.flags, chosen.jobs))
    except FileNotFoundError as error:
        parser.error(str(error))
    if wrong:
        print(f"{wrong} notebooks are not as they should be" + ("" if chosen.write else "; where the new outputs are right, `make outputs` keeps them"), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
