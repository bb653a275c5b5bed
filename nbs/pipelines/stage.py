"""A stage of the pipeline: its parameters, as its notebook says them, and its execution.

papermill puts the parameters into the notebook; the cells are executed in this process (see engine.py), so that no kernel has to be
started for each of the grid's stages. The executed notebook is kept in the profile's `runs/notebooks/`, as a report for people.
`run.py` is the command for it.
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
STAGES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.ipynb")))
SAID = ("ValueError", "FileNotFoundError", "ConnectionError", "ImportError", "NonFiniteLoss", "OSError")  # errors that are sentences for people


def prepare_process():
    "Settings of a process that executes notebooks."
    tqdm.set_lock(threading.RLock())  # no process shares a bar; its usual lock has a name that outlives a process from Python 3.14 on
    sys.path.insert(0, str(ROOT))  # the modules that DVC watches are the ones that run
    sys.modules.setdefault("rfc3987_syntax", None)  # optional for jsonschema, unused here, and 0.7 s to import
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def notebook_of(stage):
    "The notebook that a stage executes."
    return Path(__file__).with_name(f"{stage}.ipynb")


# ---- parameters ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    "argparse, with mistakes as `ValueError` for the caller to show."

    def error(self, message):
        raise ValueError(f"{message}; `python nbs/pipelines/{self.prog} --help` says what is allowed")


def sentence(stage):
    "What a stage does: the quoted sentence under its notebook's title."
    first = "".join(json.loads(notebook_of(stage).read_text())["cells"][0]["source"])
    return re.search(r"(?m)^> (.+)", first)[1]


def parameters(stage):
    "The parameters cell of a stage's notebook: name -> (default, comment)."
    import yaml
    from papermill.inspection import inspect_notebook

    return {name: (yaml.safe_load(found["default"]), found["help"]) for name, found in inspect_notebook(str(notebook_of(stage))).items()}


def parser_of(stage=None):
    "The parser of the command line: all stages, and the parameters of one."
    parser = Parser(prog="run.py", description="Run one notebook of the pipeline.", epilog="`run.py STAGE --help` lists the parameters of a stage.")
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name in STAGES:
        own = stages.add_parser(name, help=sentence(name), description=sentence(name), allow_abbrev=False)
        if name == stage:
            for parameter, (default, comment) in parameters(name).items():
                own.add_argument(option(parameter), type=type(default), default=default, metavar=type(default).__name__, help=f"{comment} (default: %(default)s)")
    return parser


def option(parameter):
    "A parameter's name on the command line."
    return f"--{parameter.replace('_', '-')}"


def parse(arguments):
    "The stage and all its parameters; `ValueError` for a name the notebook does not have, or a value of the wrong type."
    from ept.utils.checking import check_name, unknown

    stage = arguments[0] if arguments else None
    if stage is not None and stage not in (*STAGES, "-h", "--help"):
        raise unknown("stage", stage, STAGES)
    chosen, rest = parser_of(stage).parse_known_args(arguments)
    values = vars(chosen)
    del values["stage"]
    if rest:
        raise unknown("parameter", rest[0].partition("=")[0], map(option, values))
    for name in {"task", "method", "size"} & set(values):  # they become part of a path
        check_name(name, values[name])
    return stage, values


# ---- execution ----------------------------------------------------------------------------------------------------------


def executed(stage, values):
    "Where the executed notebook of a stage is kept."
    key = "-".join(str(values[name]) for name in ("task", "method", "size", "seed") if name in values)
    return Path(values["profile_file"]).resolve().parent / "runs" / "notebooks" / f"{stage}{'-' if key else ''}{key}.ipynb"


def execute(stage, values):
    "Execute a stage's notebook with these parameters, all of them; the path of the executed notebook."
    from papermill.execute import execute_notebook

    import engine  # noqa: F401, registers itself

    file = Path(values["profile_file"])
    if not file.is_file():
        from ept.grid.profiles import profile_files

        there = [os.path.relpath(path) for path in profile_files(ROOT).values()]
        raise FileNotFoundError(f"no parameter file {values['profile_file']!r}; there are: {', '.join(there)}")
    target = executed(stage, values)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial.ipynb")
    changed = {name: values[name] for name, (default, _) in parameters(stage).items() if values[name] != default}
    try:
        execute_notebook(
            str(notebook_of(stage)),
            str(partial),
            parameters=changed,
            engine_name="in-process",
            progress_bar=False,
            autosave_cell_every=0,
        )
    finally:
        if partial.exists():
            os.replace(partial, target)
    return target


def watch_locks():
    "Where DVC has started this process, keep a copy of its locks, which it writes in place when the stage has ended; `RuntimeError` if one was cut off before."
    from ept.workflow.lock_files import cut_off, keep_locks

    if root := os.environ.get("DVC_ROOT"):
        if cut_off(root):  # DVC has not seen that, and would run again what is no longer in it
            from mend import mend

            raise RuntimeError("; ".join([*mend(root), "give the same command again"]))
        keep_locks(root)


def main(arguments):
    "Command line; the exit status."
    from papermill.exceptions import PapermillExecutionError

    from ept.utils.files import temporary_folder

    start = time.perf_counter()
    try:
        stage, values = parse(arguments)
        watch_locks()
        with temporary_folder():
            target = execute(stage, values)
    except SystemExit as shown:  # --help
        return shown.code or 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        if error.ename not in SAID:
            print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), file=sys.stderr)
        kind = "" if error.ename in SAID else f"{error.ename}: "
        print(f"error: {kind}{error.evalue} (traceback in {os.path.relpath(executed(stage, values))})", file=sys.stderr)
        return 1
    said = [str(value) for name, value in values.items() if name != "profile_file"]
    print(f"{' '.join([stage, *said])}: {time.perf_counter() - start:.1f} s, see {os.path.relpath(target)}")
    return 0
