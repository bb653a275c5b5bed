"""Run one notebook of the pipeline: `python nbs/pipelines/run.py train --task cola --method ept --seed 0`.

It is run in the folder of a profile; from elsewhere `--profile-file profiles/smollm2/params.yaml` says which one is meant.
papermill puts the parameters into the notebook; the cells are executed in this process (see engine.py), so that no kernel has
to be started for each of the grid's stages. The executed notebook is kept in the profile's `runs/notebooks/`, as a report for
people. `make reproduce` also keeps a process warm that has the big libraries imported, see warm.py; then the work is done there.
"""

import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.ipynb")))


def prepare_process():
    "Settings of a process that executes notebooks."
    sys.path.insert(0, str(ROOT))  # the modules that DVC watches are the ones that run
    sys.modules.setdefault("rfc3987_syntax", None)  # optional for jsonschema, unused here, and 0.7 s to import
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
    from papermill.inspection import inspect_notebook

    return inspect_notebook(str(Path(__file__).with_name(f"{stage}.ipynb")))


def parse(arguments):
    "The stage and its parameters; `ValueError` for a name the notebook does not have."
    import yaml

    from ept.utils.checking import unknown

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
    import engine  # noqa: F401, registers itself
    import yaml
    from papermill.execute import execute_notebook

    known = {name: yaml.safe_load(parameter["default"]) for name, parameter in known_parameters(stage).items()}
    used = {**known, **values}
    file = Path(used["profile_file"])
    if not file.exists():
        from ept.grid.profiles import profile_files

        there = [os.path.relpath(path) for path in profile_files(ROOT).values()]
        raise FileNotFoundError(f"no parameter file {used['profile_file']!r}; there are: {', '.join(there)}")
    key = "-".join(str(used[name]) for name in ("task", "method", "size", "seed") if name in used)
    folder = file.resolve().parent
    target = folder / "runs" / "notebooks" / f"{stage}{'-' if key else ''}{key}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial.ipynb")
    try:
        execute_notebook(
            str(Path(__file__).with_name(f"{stage}.ipynb")), str(partial), parameters=values, engine_name="in-process",
            progress_bar=False, autosave_cell_every=0,
        )  # fmt: skip
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
    from papermill.exceptions import PapermillExecutionError

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
    print(f"{stage} {' '.join(str(v) for v in values.values())}: {time.perf_counter() - start:.1f} s, see {os.path.relpath(target)}")
    return 0


if __name__ == "__main__":
    if address := os.environ.get("EPT_WARM"):
        from warm import ask

        if (status := ask(address, sys.argv[1:])) is not None:
            sys.exit(status)
    prepare_process()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is written; taking a process apart that has imported PyTorch costs a second
