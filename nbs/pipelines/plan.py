"""The plan of a profile: its parameters checked, and what its stages depend on beside their files, in results/plan.json.

    python nbs/pipelines/plan.py  # in the folder of a profile

It holds a fingerprint of the code of every stage, what each method is told and what is searched for it, and what is said about the text of each task. Every
stage depends on its part of this small file, so this runs before anything else does, and nothing runs where it fails. It
imports nothing heavy: whether sizes exist and have allowed values is asked here in a worker of `make reproduce`, which has imported
PyTorch anyway, and else by the first stage that trains.
"""

import dataclasses
import sys
from pathlib import Path

from command import end_at_ctrl_c

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def searches(profile):
    "Method that has trials -> what its search is told; the sizes of other methods are no part of it."
    search = dataclasses.asdict(profile.search)
    shared = {name: value for name, value in search.items() if name not in ("sizes", "like", "origin")}
    return {method: {**shared, "sizes": search["sizes"].get(method, {})} for method in profile.tried}


def write_plan(file="params.yaml"):
    "Check a parameter file and write the plan beside its results; the plan."
    from ept.grid.profiles import Paths, load_profile
    from ept.methods.catalogue import catalogue
    from ept.utils.checking import unknown
    from ept.utils.files import write_json
    from ept.utils.fingerprints import code_version
    from layout import differences

    profile, known = load_profile(file), catalogue()
    for method in (*profile.grid.methods, *profile.methods):
        if method not in known:
            raise ValueError(f"{file}: {unknown('method', method, known)}")
    if "torch" in sys.modules:
        from ept.grid.configuration import check

        check(profile)
    other, left = differences(profile)
    if other or left:
        raise ValueError(f"{', '.join((*other, *left))} {'is' if len((*other, *left)) == 1 else 'are'} not what {file} asks for; run: make pipeline")
    methods = dict.fromkeys((*profile.grid.methods, *(("pt",) if profile.grid.transfer else ())))  # source prompts are of `pt`
    plan = {
        "code": {notebook.stem: code_version(notebook) for notebook in sorted(HERE.glob("*.ipynb"))},
        "methods": {method: {"code": code_version(known[method]), "parameters": profile.methods.get(method, {})} for method in methods},
        **({"search": searches(profile)} if profile.tried else {}),
        "text": {task: profile.text(task) for task in profile.prepared},
        **({"sources": {plan.task: plan.values for plan in profile.source_plans()}} if profile.grid.transfer else {}),
    }
    write_json(Paths(profile).plan, plan)
    return plan


if __name__ == "__main__":
    end_at_ctrl_c()
    sys.path[:0] = [str(ROOT), str(HERE)]
    from stage import watch_locks

    try:
        watch_locks()
        write_plan(*sys.argv[1:])
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
