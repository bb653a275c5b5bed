"""How long the `paper` profile would take on 1, 8 and 64 GPUs: computed, not measured. `make hours`, or `python bench/paper.py --help`.

No GPU has run it. What is known: the operations of a training step of every method on T5-base, and what it costs the processor that
launches them (`--count` finds both); how large a share of a machine's matrix rate a step has reached (bench.py, on a CPU); how long the
texts of each task are (lengths.py). What is assumed stands in ASSUMED. From these come the seconds of every stage, and the coordinator's
own `Schedule` goes through the graph that DVC draws of the profile, in made-up time.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
from collections import Counter, deque
from functools import cache
from pathlib import Path

import contender
from bench import FOLDER, batches, seconds_of
from show import replace_part, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from ept.data.tasks import TASKS  # noqa: E402
from ept.grid.configuration import resolve  # noqa: E402
from ept.grid.profiles import load_profile  # noqa: E402
from ept.grid.search import shorten  # noqa: E402
from ept.methods.registry import get_method  # noqa: E402
from ept.training.distillation import plan_mixture  # noqa: E402
from ept.workflow.scheduling import Schedule  # noqa: E402
from ept.workflow.stages import Stages  # noqa: E402

ASSUMED = {
    "GPU": "A100",
    "bfloat16": 0.75 * 312e12,  # operations a second in products of large matrices: three quarters of what its maker states
    "float32": 0.75 * 19.5e12,  # the same; PyTorch does not round to TF32 unless it is told to
    "around": 30.0,  # seconds of a stage on a GPU beside its steps: libraries, model, the tokens of all rows
    "elsewhere": 60.0,  # seconds of a stage that needs no GPU
}
SHARES = {"as on the CPU": None, "a quarter": 0.25}  # of the matrix rate that a step reaches
LIKE = {"spot": "pt", "attempt": "pt", "mpt": "pt"}  # a prompt of 100 tokens, and little more
TEACHER = 1.5  # steps of `shared` also score their batch with the prompts that are imitated
PUBLIC = {  # published rows from which validation and test rows come
    "mnli": 9832, "qqp": 40430, "qnli": 5463, "sst2": 872, "stsb": 1500, "mrpc": 408, "rte": 277, "cola": 1043,
    "multirc": 4848, "boolq": 3270, "wic": 638, "wsc": 104, "cb": 56,
}  # fmt: skip
GPUS = (1, 8, 64)
SHAPE, LENGTHS = "t5-base", [32, 128, 256]  # of bench.py: backbone, tokens of a text
STEPS = HERE / "results" / "paper" / "steps.json"
HOURS = HERE / "results" / "paper" / "hours.json"


# ---- counted once -------------------------------------------------------------------------------------------------------


def count(profile, say):
    "For each method the operations of a step by length, and the seconds that it takes to launch one; of a T5 that is as deep as T5-base and hardly wide."
    found = {}
    for shape in (SHAPE, "thin"):
        if not (FOLDER / shape / "config.json").exists():
            contender.backbone({"shape": shape, "folder": str(FOLDER / shape)})
    for method in sorted({LIKE.get(method, method) for method in profile.grid.methods}):
        precision = get_method(method).precision or "bfloat16"
        job = {"contender": f"{method}@float32", "batch_size": 1, "lengths": LENGTHS}  # as many operations, as many calls; not every processor has bfloat16
        operations = contender.operations({"shape": SHAPE, "folder": str(FOLDER / SHAPE), **job})["operations"]
        launched = contender.launch({"shape": "thin", "folder": str(FOLDER / "thin"), "warm_up": 3, "steps": 20, **job})["launch_seconds"]
        found[method] = {"precision": precision, "operations": operations, "launch_seconds": statistics.median(launched)}
        say(f"{method}: {operations[128] / 1e9:.0f} GFLOP for a text of 128 tokens, launched in {1000 * found[method]['launch_seconds']:.0f} ms")
    STEPS.parent.mkdir(parents=True, exist_ok=True)
    STEPS.write_text(json.dumps(found, indent=1) + "\n")


# ---- seconds of a stage -------------------------------------------------------------------------------------------------


class Costs:
    "Seconds of the stages of a profile on a GPU."

    def __init__(
        self,
        profile,
        measured,  # a result of bench.py
        share=None,  # of the matrix rate that a step reaches; None is as measured
        together=1,  # runs that share a GPU
    ):
        self.profile, self.share, self.together = profile, share, together
        self.steps = json.loads(STEPS.read_text())
        self.lengths = json.loads((HERE / "lengths.json").read_text())["t5"]
        shape = json.loads(measured.read_text())["shapes"][SHAPE]
        self.reached = {kind: statistics.mean(self._shares(shape, name, kind)) for kind, name in (("bfloat16", "ept"), ("float32", "ept@float32"))}
        self.scoring = statistics.mean(shape["score"]["ept"][str(n)]["median"] / shape["train"]["ept"]["step_seconds"][str(n)]["median"] for n in LENGTHS)

    @staticmethod
    def _shares(shape, name, kind):
        found = shape["train"][name]
        return [found["operations"][n] / s["median"] / shape["rates"][kind] for n, s in found["step_seconds"].items()]

    def step(self, method, length, size):
        "Seconds of a training step on texts of one length: its operations, or their launching where that takes longer."
        counted = self.steps[LIKE.get(method, method)]
        operations = seconds_of({n: {"median": value} for n, value in counted["operations"].items()}, length) * size
        rate = ASSUMED[counted["precision"]] * (self.share or self.reached[counted["precision"]])
        return max(operations / rate * self.together, counted["launch_seconds"])

    @cache  # noqa: B019
    def mean_step(self, method, task, size):
        "The same, mean over the batches that a training forms."
        drawn = self._draw(task, 100 * size)
        return statistics.mean(self.step(method, length, size) for length in batches(method, drawn, size))

    def _draw(self, task, number):
        counts = self.lengths[task]
        return random.Random(task).choices([int(n) for n in counts], list(counts.values()), k=number)

    def scored(self, method, task, rows, size):
        "Seconds to score rows of a task."
        return rows / size * self.mean_step(method, task, size) * self.scoring

    def trained(self, method, task, training):
        "Seconds of a training with its validations, the one before the first step included."
        validations = training.steps // training.evaluate_every + 1
        return training.steps * self.mean_step(method, task, training.batch_size) + validations * self.scored(method, task, rows_of(task)[0], training.batch_size)

    def shared(self, plan):
        "Seconds of a training on a mixture of the source tasks."
        training, sources = resolve(plan)[0], self.profile.grid.sources
        sizes = [TASKS[task].hub.published_train for task in sources]
        texts = {task: iter(self._draw(task, 100 * training.batch_size)) for task in sources}
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        task_of = lambda index: sources[next(k for k, end in enumerate(ends) if index < end)]
        longest = [max(next(texts[task_of(index)]) for index in batch) for batch in plan_mixture(sizes, training.batch_size, 100, 0)]
        step = TEACHER * statistics.mean(self.step("pt", -(-length // 8) * 8, training.batch_size) for length in longest)
        validations = training.steps // training.evaluate_every + 1
        return training.steps * step + validations * sum(self.scored("pt", task, rows_of(task)[0], training.batch_size) for task in sources)

    def stage(self, kind, task=None, method=None, seed=0, size=None):
        "Seconds of a stage, by the words of its command; None for one that needs no GPU."
        profile, search = self.profile, self.profile.search
        if kind in ("train", "sweep"):
            return self.trained(method or "ept", task, resolve(profile.run(task, method or "ept", int(seed), size))[0])
        if kind == "evaluate":
            return self.scored(method, task, rows_of(task)[1], resolve(profile.run(task, method, int(seed)))[0].batch_size)
        if kind == "source":
            return self.trained("pt", task, resolve(profile.source(task, int(seed)))[0])
        if kind == "shared":
            return self.shared(profile.source("shared", int(seed)))
        if kind == "search":
            trial = lambda task, seed: self.trained(method, task, shorten(resolve(profile.run(task, method, seed))[0], search.steps))
            return search.trials * sum(trial(task, seed) for task in search.tasks for seed in search.seeds)
        return None


def rows_of(task):
    "Rows of a task's validation and test splits."
    if TASKS[task].hub.small:
        return PUBLIC[task] // 2, PUBLIC[task] - PUBLIC[task] // 2
    return (PUBLIC[task], PUBLIC[task]) if TASKS[task].hub.test else (1000, PUBLIC[task])


def words_of(command):
    "The kind of a stage and its options, of the command that runs it."
    words = command.partition("run.py ")[2].split()
    return words[:1], dict(zip((word.removeprefix("--") for word in words[1::2]), words[2::2]))


# ---- in made-up time ----------------------------------------------------------------------------------------------------


def simulate(needs, seconds, gpu, gpus):
    "The time at which all stages are done, as the coordinator would begin them: those of `gpu` on one of so many, others on a slot for each eight."
    schedule, now, free = Schedule(needs), 0.0, {True: gpus, False: -(-gpus // 8)}
    waiting, running, limit = {True: deque(), False: deque()}, [], 2 * sum(free.values())
    while True:
        while len(running) + sum(map(len, waiting.values())) < limit and (stage := schedule.next()):
            waiting[stage in gpu].append(stage)
        for kind, queue in waiting.items():
            while queue and free[kind]:
                stage = queue.popleft()
                free[kind] -= 1
                heapq.heappush(running, (now + seconds[stage], stage))
        if not running:
            return now
        now, stage = heapq.heappop(running)
        free[stage in gpu] += 1
        schedule.done(stage)


def longest_chain(needs, seconds):
    "Stages that wait for each other and take the longest together, first to last; stages come after what they need."
    ends, before = {}, {}
    for stage, others in needs.items():
        before[stage] = max(others, key=ends.get, default=None)
        ends[stage] = seconds[stage] + ends.get(before[stage], 0.0)
    chain = [max(ends, key=ends.get)]
    while before[chain[0]]:
        chain.insert(0, before[chain[0]])
    return chain


def hours(stages, costs, gpus):
    "What the grid takes on so many GPUs, and what it cannot be faster than, in hours."
    found = {name: costs.stage(*kind, **options) for name, stage in stages.stages.items() for kind, options in [words_of(stage.cmd or "")] if kind}
    gpu = {name for name, seconds in found.items() if seconds is not None}
    seconds = {name: found[name] + ASSUMED["around"] if name in gpu else ASSUMED["elsewhere"] for name in stages}
    chain = longest_chain(stages.needs, seconds)
    return {
        "hours": simulate(stages.needs, seconds, gpu, gpus * costs.together) / 3600,
        "work": sum(seconds[name] for name in gpu) / 3600 / (gpus * costs.together),
        "chain": sum(seconds[name] for name in chain) / 3600,
        "stages of the chain": chain,
    }


def kind_of(stage):
    "What a stage is, without its task and seed."
    return stage.rpartition(":")[2].partition("@")[0].removesuffix("-transfer")


# ---- what is shown ------------------------------------------------------------------------------------------------------


def compute(profile, measured):
    "Hours for each number of GPUs, each share of the matrix rate, and one or two runs on a GPU."
    stages, rows = Stages(profile.file.parent), []
    for share, value in SHARES.items():
        for together in (1, 2):
            costs = Costs(profile, measured, value, together)
            rows += [{"gpus": gpus, "share": share, "together": together, **hours(stages, costs, gpus)} for gpus in GPUS]
    costs = Costs(profile, measured)
    steps = {task: {method: costs.mean_step(method, task, profile.training["batch_size"]) for method in ("ept", "pt", "finetune")} for task in ("sst2", "mnli", "multirc")}
    kinds = Counter(map(kind_of, stages))
    return {"assumed": ASSUMED, "reached": costs.reached, "scoring": costs.scoring, "stages": dict(kinds), "batch": profile.training["batch_size"], "steps": steps, "rows": rows}


def show(found):
    "What was computed, as Markdown."
    assumed, reached = found["assumed"], found["reached"]
    rates = f"{assumed['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16 and {assumed['float32'] / 1e12:.0f} in float32"
    gpu = f"a GPU that multiplies large matrices at {rates}, three quarters of what the maker of the {assumed['GPU']} states; {assumed['around']:.0f} s around a stage's steps"
    share = f"{100 * reached['bfloat16']:.0f} % of that rate in bfloat16 and {100 * reached['float32']:.0f} % in float32, as on the CPU above"
    parts = [f"Computed, not measured: nothing of this profile has run on a GPU. Assumed is {gpu}. A step reaches {share}, or a quarter, as small models often do."]
    rows = []
    for row in found["rows"]:
        if row["gpus"] == 1:
            rows.append([row["share"], str(row["together"])])
        bound, least = ("work", row["work"]) if row["work"] > row["chain"] else ("chain", row["chain"])
        rows[-1].append(f"{row['hours']:.0f} h ({bound}: {least:.0f} h)")
    parts.append(table(["share of the matrix rate", "runs on a GPU", *(f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS)], rows))
    times = "; ".join(f"{task}: {', '.join(f'`{method}` {1000 * s:.0f} ms' for method, s in by.items())}" for task, by in found["steps"].items())
    chain = " → ".join(f"`{stage}`" for stage in found["rows"][0]["stages of the chain"])
    parts.append(f"In brackets: what bounds it, the work of all stages over the GPUs or the longest chain of stages that wait for each other: {chain}.")
    parts.append(f"A step of {found['batch']} examples, mean over the batches of a task, at the first share: {times}.")
    return "\n\n".join(parts) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count operations and time the launching of steps anew: minutes")
    parser.add_argument("--measured", type=Path, default=HERE / "results" / "epyc-2-cores.json", help="a result of bench.py: the share of the matrix rate")
    options = parser.parse_args(arguments)
    profile = load_profile(ROOT / "profiles" / "paper" / "params.yaml")
    if options.count:
        count(profile, lambda text: print(text, file=sys.stderr, flush=True))
    found = compute(profile, options.measured)
    HOURS.write_text(json.dumps(found, indent=1) + "\n")
    replace_part(HERE / "README.md", "paper", show(found))
    print(show(found))


if __name__ == "__main__":
    main()
