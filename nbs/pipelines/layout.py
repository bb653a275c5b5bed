"""The files by which DVC knows a profile, written from its params.yaml; and new profiles.

    python nbs/pipelines/layout.py                                  # write those of all profiles
    python nbs/pipelines/layout.py --new mine --from smollm2-plain  # a new profile in profiles/mine, a copy of another
    python nbs/pipelines/layout.py --new mine --tasks a.yaml        # the same on tasks of one's own

A profile is a folder: the repository's root for the default one, profiles/<name> for the others. Each of those is a DVC project
of its own (a subdirectory project, as `dvc init --subdir` makes it), so that a command in one reads no stage of another:
`dvc status` in the root is about the default profile, `cd profiles/smollm2-plain && dvc repro` about that one.

What a person edits is params.yaml, and the files of tasks of one's own. Methods, seeds and all numbers in it are read by DVC itself.
Only what DVC cannot express is written here: one dvc.yaml for each task of the list, and which kinds of stages there are at all.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from command import end_at_ctrl_c

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).with_name("templates")
SUFFIXES = {"references": "", "methods": "", "transfer": "-transfer"}  # of the names of stages, by list of the grid
PROJECT = {  # what makes a folder a DVC project
    ".dvc/config": "[core]\n    analytics = false\n    check_update = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvc/plots/curves.json": (ROOT / ".dvc" / "plots" / "curves.json").read_text(),
    ".dvcignore": "runs/notebooks\nruns/checkpoints\nruns/costs\nruns/logs\nruns/search\n*.ept-new\n*.ept-old\n",
}


def generated(profile):
    "Path below the profile's folder -> text, of every file that is written for a profile."
    import jinja2

    from ept.methods.catalogue import catalogue
    from ept.utils.fingerprints import import_closure

    folder = profile.file.parent
    project, root = ({}, "") if folder == ROOT else (PROJECT, "../" * len(folder.relative_to(ROOT).parts))
    notebooks = sorted(p.name for p in Path(__file__).parent.glob("*.ipynb"))
    code = ["ept", "nbs/pipelines"]
    if project:  # outside of a project DVC ignores no caches, so each file is named
        reached = {file.relative_to(ROOT).as_posix() for entry in (*map(Path(__file__).with_name, notebooks), *catalogue().values()) for file in import_closure(entry).values()}
        code = [f"{root}{name}" for name in sorted(reached)] + [f"{root}nbs/pipelines/{name}" for name in notebooks]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quoted"] = quoted
    lists = [(name, suffix) for name, suffix in SUFFIXES.items() if name == "methods" or getattr(profile.grid, name)]
    choices = seen_from(folder, profile.choice_file("ept").parent) if profile.searched else None
    write = lambda template, **values: environment.get_template(template).render(profile=profile, root=root, code=code, choices=choices, **values)
    listed = {task: lists if task in profile.grid.tasks else [] for task in profile.prepared}  # of a source task beside the grid only the rows are needed
    tasks = {f"tasks/{task}/dvc.yaml": write("task.yaml.jinja", task=task, lists=found, files=rows_of(profile, task, root)) for task, found in listed.items()}
    task_files = [seen_from(folder, task.data.folder / f"{name}.yaml") for name, task in profile.own.items()]
    return project | {"dvc.yaml": write("profile.yaml.jinja", task_files=task_files, searches=searches(profile))} | tasks


def quoted(path):
    "A path as YAML has it, in quotes where it would be read as something else."
    import yaml

    return yaml.safe_dump([path], allow_unicode=True, width=10_000).removeprefix("- ").rstrip("\n")


def searches(profile):
    "Suffix of a search's stage -> the methods that have trials in it; those that start from other tasks have to wait for their sources."
    transfer = {suffix: [m for m in profile.tried if (m in profile.grid.transfer) == bool(suffix)] for suffix in ("", "-transfer")}
    return {suffix: methods for suffix, methods in transfer.items() if methods}


def seen_from(folder, file):
    "Path of a file, relative to a folder."
    return Path(os.path.relpath(file, folder)).as_posix()


def rows_of(profile, task, root):
    "Files or folders of this repository in which a task's rows lie, relative to the profile's folder; none for the benchmarks."
    if task in profile.own:
        return [seen_from(profile.file.parent, file) for file in profile.own[task].data.files.values()]
    return [f"{root}{profile.data.folder}/{profile.task(task).hub.folder}"] if profile.data.folder else []


def differences(profile):
    "Generated files that are missing or other than the parameters say, and files of tasks that are no longer in the grid."
    folder, due = profile.file.parent, generated(profile)
    other = [name for name, text in due.items() if not (folder / name).exists() or (folder / name).read_text() != text]
    left = [str(path.relative_to(folder)) for path in sorted(folder.glob("tasks/*/dvc.yaml")) if str(path.relative_to(folder)) not in due]
    return other, left


def write_layout(profile):
    "Write the files of a profile; those that have changed."
    from ept.utils.files import write_atomic

    folder, due, (other, left) = profile.file.parent, generated(profile), differences(profile)
    for name in other:
        write_atomic(folder / name, due[name])
    for name in left:
        (folder / name).unlink()
    return [*other, *left]


def copy_task(file, folder):
    "Copy a task file and the files that it names into a folder, under the same names; the task's name."
    from ept.data.task_files import read_task

    task = read_task(file)
    for source in (Path(file), *task.data.files.values()):
        name = seen_from(task.data.folder, source)
        if Path(name).is_absolute() or name.startswith(".."):
            raise ValueError(f"{file} names {name}; the files of a task lie beside it, or below, so that they can be copied together")
        if not source.is_file():
            raise FileNotFoundError(f"{file} names {name}, but there is no file {source}")
        target = folder / name
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise ValueError(f"two tasks name different files {name}; call one of them otherwise")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return task.name


def with_tasks(text, names):
    "The text of a parameter file with other tasks, whose rows lie where their files say; a search is made on all of them."
    text = with_section(text, "data", ["source: own  # each task names its files"])
    if found := section(text, "search"):
        listed = r"(\btasks:)(?:\s*\[[^]]*\]|(?:\s*\n\s*- [^\n]*)+)"
        text = text[: found.start()] + re.sub(listed, rf"\1 [{', '.join(names)}]", found[0], count=1) + text[found.end() :]
    return with_section(text, "tasks", [f"{name}: {{}}" for name in names])


def section(text, name):
    "Where a section stands in the text of a parameter file; the first group is the comment in its first line."
    head, body = rf"^{name}:[^#\n]*(#[^\n]*)?(?:\n|\Z)", r"(?:(?:[ \t]*\n)*[ \t]+\S[^\n]*(?:\n|\Z))*"
    return re.search(f"(?m){head}{body}", text)


def with_section(text, name, lines):
    "The text of a parameter file with other lines in one section; a comment in the section's first line stays."
    found = section(text, name)
    written = "\n  ".join([f"{name}:" + (f"  {found[1]}" if found[1] else ""), *lines]) + "\n"
    return text[: found.start()] + written + text[found.end() :]


def new_profile(name, origin, tasks=()):
    "Make profiles/<name> with the parameters of another profile, on its tasks or on those of some task files; its parameter file."
    from ept.grid.profiles import load_profile, profile_files
    from ept.utils.checking import check_name, unknown
    from ept.utils.files import write_atomic

    known = profile_files(ROOT)
    check_name("profile", name)
    if origin not in known:
        raise unknown("profile", origin, known)
    if name in known or (ROOT / "profiles" / name).exists():
        raise ValueError(f"there is a profile {name!r} already; choose another name, or edit {known.get(name, ROOT / 'profiles' / name)}")
    text, count = re.subn(r"(?m)^profile:[^#\n]*?(?=\s*$|\s+#)", f"profile: {name}", known[origin].read_text(), count=1)
    if not count:
        raise ValueError(f"{known[origin]} has no line `profile: {origin}`")
    text = re.sub(r"\A(#.*\n)*", f"# Profile `{name}`: it began with the parameters of `{origin}`.\n", text)
    folder, shared = ROOT / "profiles" / name, ROOT / "tasks"  # a task file in the root's folder is found by every profile
    files = [Path(file).resolve() for file in tasks] or [task.data.folder / f"{own}.yaml" for own, task in load_profile(known[origin]).own.items()]
    try:
        names = [file.stem if file.parent == shared else copy_task(file, folder / "tasks") for file in files]
        file = write_atomic(folder / "params.yaml", with_tasks(text, names) if tasks else text)
        write_layout(load_profile(file))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError) and re.search(r"grid\.|data\.source", str(error)) and tasks:
            raise ValueError(f"{error}. The grid of {origin!r} needs its own tasks; begin with another profile, or without tasks, and edit params.yaml") from error
        raise
    return file


def main(arguments=None):
    "Command line; the exit status."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", metavar="NAME", help="make a new profile of this name")
    parser.add_argument("--from", dest="origin", metavar="PROFILE", help="whose parameters it begins with; without it, the default profile's")
    parser.add_argument("--tasks", metavar="FILE", nargs="*", default=[], help="task files, in place of the tasks of those parameters")
    chosen = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from ept.grid.profiles import load_profile, profile_files
    from ept.utils.locks import only_one

    try:
        if chosen.new is not None:
            file = new_profile(chosen.new, chosen.origin or next(iter(profile_files(ROOT))), chosen.tasks)
            print(f"edit {file.relative_to(ROOT)}, then: make reproduce PROFILE={chosen.new}")
            return 0
        for name, file in profile_files(ROOT).items():
            with only_one(file.parent / ".dvc" / "tmp" / "coordinator", file.parent):
                changed = write_layout(load_profile(file))
            print(f"{name}: {', '.join(changed) or 'up to date'}")
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_at_ctrl_c("the same command begins anew")
    sys.exit(main())
