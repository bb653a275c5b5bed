"""Run one notebook of the pipeline: `python nbs/pipelines/run.py train --task cola --method ept --seed 0`.

papermill puts the parameters into the notebook; the cells are executed here, in this process, so that no kernel has to be
started for each of the grid's stages. The executed notebook is kept under `runs/<profile>/notebooks/`, as a report for people.
"""

import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the modules that DVC watches are the ones that run
sys.modules.setdefault("rfc3987_syntax", None)  # optional for jsonschema, unused here, and 0.7 s to import
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nbformat  # noqa: E402
import yaml  # noqa: E402
from IPython.core.displayhook import DisplayHook  # noqa: E402
from IPython.core.displaypub import DisplayPublisher  # noqa: E402
from IPython.core.interactiveshell import InteractiveShell  # noqa: E402
from papermill.engines import Engine, papermill_engines  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402
from papermill.execute import execute_notebook  # noqa: E402
from papermill.inspection import inspect_notebook  # noqa: E402
from traitlets.config import Config  # noqa: E402

from ept.settings import unknown  # noqa: E402

STAGES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.ipynb")))


class _Hook(DisplayHook):
    "Keeps the value of a cell's last line."

    def write_output_prompt(self):
        pass

    def write_format_data(self, data, metadata=None):
        output = nbformat.v4.new_output("execute_result", data, metadata=metadata or {}, execution_count=self.prompt_count)
        self.shell.outputs.append(output)

    def log_output(self, data):
        pass


class _Publisher(DisplayPublisher):
    "Keeps what a cell displays."

    def publish(self, data, metadata=None, **_):
        self.shell.outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata or {}))


class _Shell(InteractiveShell):
    "IPython that collects a cell's outputs in notebook form."

    displayhook_class, display_pub_class = _Hook, _Publisher

    def __init__(self, **keywords):
        self.outputs = []
        super().__init__(**keywords)
        svg = self.display_formatter.formatters["image/svg+xml"]
        svg.for_type_by_name("matplotlib.figure", "Figure", _figure)

    def init_history(self):
        super().init_history()
        self.history_manager.enabled = False

    def _showtraceback(self, etype, evalue, stb):
        lines = [str(line) for line in stb]
        self.outputs.append(nbformat.v4.new_output("error", ename=etype.__name__, evalue=str(evalue), traceback=lines))


def _figure(figure):
    "A matplotlib figure as SVG."
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return buffer.getvalue()


class _Tee:
    "A stream that shows what is written to it, and keeps it for the notebook as a terminal would look in the end."

    def __init__(self, stream, name, outputs):
        self.stream, self.name, self.outputs, self.text = stream, name, outputs, ""

    def write(self, text):
        self.text += text
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()

    def close_output(self):
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in self.text.split("\n")]
        if text := re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(lines)):
            self.outputs.insert(0, nbformat.v4.new_output("stream", name=self.name, text=text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


class InProcess(Engine):
    "A papermill engine that executes the cells in this process."

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **_):
        shell = _Shell.instance(config=Config(HistoryManager={"hist_file": ":memory:"}))
        for number, cell in enumerate(manager.nb.cells):
            manager.cell_start(cell, number)
            if cell.cell_type == "code" and not cls.execute_cell(shell, cell):
                manager.cell_exception(cell, number)
                manager.cell_complete(cell, number)
                break
            manager.cell_complete(cell, number)

    @staticmethod
    def execute_cell(shell, cell):
        "Run one cell; whether it went well."
        shell.outputs = outputs = []
        streams = [_Tee(sys.stdout, "stdout", outputs), _Tee(sys.stderr, "stderr", outputs)]
        kept = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = streams
        try:
            result = shell.run_cell(cell.source, store_history=True)
        finally:
            sys.stdout, sys.stderr = kept
            for stream in streams:
                stream.close_output()
        cell.outputs, cell.execution_count = list(outputs), shell.execution_count - 1
        return result.success


papermill_engines.register("in-process", InProcess)


def usage(stage=None):
    "Help for one stage, or for all."
    lines = ["usage: python nbs/pipelines/run.py STAGE [--NAME VALUE]...", "", f"stages: {', '.join(STAGES)}"]
    for name in [stage] if stage else STAGES:
        lines += ["", f"{name}:"]
        for parameter in known_parameters(name).values():
            lines.append(f"  --{parameter['name'].replace('_', '-'):<14} {parameter['help']} (default {parameter['default']})")
    return "\n".join(lines)


def known_parameters(stage):
    "The parameters cell of a stage's notebook, by name."
    return inspect_notebook(str(Path(__file__).with_name(f"{stage}.ipynb")))


def parse(arguments):
    "The stage and its parameters; `ValueError` for a name the notebook does not have."
    stage, *rest = arguments
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    known, values = known_parameters(stage), {}
    pairs = [p for a in rest for p in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]
    while pairs:
        name = pairs.pop(0)
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in known:
            raise unknown("parameter", name, [f"--{k.replace('_', '-')}" for k in known])
        if not pairs:
            raise ValueError(f"{name} has no value")
        text, is_text = pairs.pop(0), isinstance(yaml.safe_load(known[key]["default"]), str)
        values[key] = text if is_text else yaml.safe_load(text)
    return stage, values


def run(stage, values):
    "Execute a stage's notebook with these parameters; the path of the executed notebook."
    known = {name: yaml.safe_load(parameter["default"]) for name, parameter in known_parameters(stage).items()}
    used = {**known, **values}
    file = ROOT / used["profile_file"]
    if not file.exists():
        there = ["params.yaml", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("profiles/*/params.yaml"))]
        raise unknown("parameter file", used["profile_file"], there)
    profile = yaml.safe_load(file.read_text())["profile"]
    key = "-".join(str(used[name]) for name in ("task", "method", "seed") if name in used)
    target = ROOT / "runs" / profile / "notebooks" / f"{stage}{'-' if key else ''}{key}.ipynb"
    if stage == "report":
        target = ROOT / "results" / profile / "report" / "report.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial.ipynb")
    try:
        execute_notebook(
            str(Path(__file__).with_name(f"{stage}.ipynb")), str(partial), parameters=values, engine_name="in-process",
            progress_bar=False, cwd=str(ROOT), autosave_cell_every=0,
        )
    finally:
        if partial.exists():
            os.replace(partial, target)
    return target


def main(arguments):
    "Command line; the exit status."
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        stage = next((a for a in arguments if a in STAGES), None)
        print(usage(stage))
        return 0 if arguments else 2
    start = time.perf_counter()
    try:
        stage, values = parse(arguments)
        target = run(stage, values)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), file=sys.stderr)
        print(f"error: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    print(f"{stage} {' '.join(str(v) for v in values.values())}: {time.perf_counter() - start:.1f} s, see {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
