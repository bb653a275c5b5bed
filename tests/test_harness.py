"""Adapters in EleutherAI's lm-evaluation-harness, the real package, on tasks that are written here."""

import json
import sys
from importlib.metadata import entry_points

import pytest
import torch
import yaml

from ept.methods.registry import METHODS
from tests.conftest import perturbed, tiny_backbone
from tests.test_battery import build

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'ept-prompt-tuning[harness]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ept.training import harness
from ept.training.harness import AdapterLM

ROWS = [{"text": f"{word} {n}", "label": int(word == "red")} for n in range(3) for word in ("red", "blue")]
CHOICE = {
    "task": "colour",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}} is",
    "doc_to_choice": ["cold", "warm"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}
UNTIL = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
PAIRS = [("a b", " c"), ("some longer context", " d e f"), ("", "x"), ("a b", " other")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks for the harness: a choice, generation, and the probability of a text."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    free = {**CHOICE, **UNTIL, **data, "task": "say"}
    del free["doc_to_choice"]
    probable = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    rolling = {**CHOICE, **probable, **data, "task": "text"}
    del rolling["doc_to_choice"]
    for task in ({**CHOICE, **data}, free, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def results(model, tasks, names, **arguments):
    found = simple_evaluate(model, tasks=names, task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0, **arguments)
    return {name: {k: v for k, v in found["results"][name].items() if isinstance(v, float)} for name in names}, found


def adapter(method, backbone):
    return perturbed(build(METHODS[method], backbone.model))


def requests(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(pairs)]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_without_a_prompt_it_is_the_harness_s_own_model(backbone, batch_size):
    """The same numbers as `--model hf` on the backbone: what is ours is the prompt and nothing else."""
    ours = AdapterLM(build(METHODS["frozen"], backbone.model), backbone, batch_size=batch_size)
    theirs = HFLM(pretrained=backbone.model, tokenizer=backbone.tokenizer, batch_size=2)
    for (probability, greedy), (other, same) in zip(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS)), strict=True):
        assert probability == pytest.approx(other, abs=1e-4) and greedy == same
    if batch_size == 3:
        texts = requests([("a text of some words",), ("another",)], "loglikelihood_rolling")
        assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
        until = requests([(text, {"until": ["\n\n"], "max_gen_toks": 5}) for text, _ in PAIRS if text], "generate_until")
        assert ours.generate_until(until) == theirs.generate_until(until)


@pytest.mark.parametrize("method", ["ept", "pt", "attempt", "adept", "lora"])
def test_a_continuation_is_as_probable_as_the_model_says(backbone, method):
    """The offset is added to the context and not to the continuation, as in training and in `score`."""
    model = adapter(method, backbone)
    ours = AdapterLM(model, backbone, batch_size=4)
    pairs = [(context, continuation) for context, continuation in PAIRS if context]
    for (context, continuation), (probability, greedy) in zip(pairs, ours.loglikelihood(requests(pairs)), strict=True):
        before, after = ours._encode_pair(context, continuation)
        before = before[-ours.covered :]
        score = model.score(torch.tensor([before]), candidates=[after])[0, 0].item()
        assert probability == pytest.approx(score, abs=1e-3), (context, continuation)
        said = model.generate(torch.tensor([before]), max_new_tokens=len(after), min_new_tokens=len(after), do_sample=False)[0].tolist()
        assert greedy == (said[-len(after) :] == after)


def test_what_is_generated_is_what_the_model_generates(backbone):
    model = adapter("ept", backbone)
    contexts = ["a b", "some longer"]
    found = AdapterLM(model, backbone, batch_size=2).generate_until(requests([(c, {"until": ["\n\n"], "max_gen_toks": 5}) for c in contexts], "generate_until"))
    for context, text in zip(contexts, found, strict=True):
        ids = model.generate(**backbone.tokenizer(context, return_tensors="pt", return_token_type_ids=False), max_new_tokens=5, do_sample=False)[0]
        assert text == backbone.tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0]


def test_a_long_context_loses_its_beginning_and_that_is_said(backbone, caplog):
    ours, long = AdapterLM(adapter("dept", backbone), backbone), "x" * 30 + "end of the"
    with caplog.at_level("WARNING", logger="ept"):
        (whole,), (end,) = (ours.loglikelihood(requests([(text, " text")])) for text in (long, long[-11:] if ours.backend == "seq2seq" else long[-12:]))
    assert whole == pytest.approx(end, abs=1e-4)
    assert "1 of 1 contexts were longer than 12 tokens and lost their beginning" in caplog.text
    free = AdapterLM(adapter("pt", backbone), backbone)
    assert free.covered > 40, "a prompt without offset reads whatever the backbone reads"


def test_a_task_of_each_kind_runs(tasks, monkeypatch, tmp_path):
    """From an adapter folder, by the name `ept`, as `lm_eval --model ept --model_args adapter=...` does it."""
    backbone = tiny_backbone("llama")
    backbone.model.save_pretrained(tmp_path / "backbone")
    backbone.tokenizer.save_pretrained(tmp_path / "backbone")
    folder = adapter("ept", backbone).save_pretrained(tmp_path / "adapter")
    arguments = f"adapter={folder},backbone={tmp_path / 'backbone'},precision=float32"
    found, record = results("ept", tasks, ["colour", "say", "text"], model_args=arguments, batch_size=2)
    assert set(found) == {"colour", "say", "text"} and 0 <= found["colour"]["acc,none"] <= 1
    assert record["config"]["adapter_type"] == "ept" and record["config"]["prompt_tokens"] == 6
    model = AdapterLM(str(folder), str(tmp_path / "backbone"), precision="float32")
    expected = [row["label"] == max((0, 1), key=lambda i: model.loglikelihood(requests([(f"{row['text']} is", f" {CHOICE['doc_to_choice'][i]}")]))[0][0]) for row in ROWS]
    assert found["colour"]["acc,none"] == pytest.approx(sum(expected) / len(ROWS))


def test_the_package_says_where_its_model_is():
    """For harnesses that read the entry point; and the command for those that do not."""
    declared = {(e.group, e.name): e for group in ("lm_eval.models", "console_scripts") for e in entry_points(group=group) if e.value.startswith("ept.")}
    if not declared:
        pytest.skip("the package is not installed, or from before the entry point; run `make install`")
    assert declared["lm_eval.models", "ept"].load() is AdapterLM
    assert declared["console_scripts", "ept-lm-eval"].load() is harness.main


def test_the_command_line(tasks, tmp_path, monkeypatch):
    begin = TaskManager.__init__  # the harness's own tasks are thousands of files, and reading them takes long
    monkeypatch.setattr(TaskManager, "__init__", lambda self, *given, **options: begin(self, *given, **{**options, "include_defaults": False}))
    backbone = tiny_backbone("t5")
    backbone.model.save_pretrained(tmp_path / "backbone")
    backbone.tokenizer.save_pretrained(tmp_path / "backbone")
    folder = adapter("dept", backbone).save_pretrained(tmp_path / "adapter")
    arguments = f"adapter={folder},backbone={tmp_path / 'backbone'}"
    command = ["run", "--model", "ept", "--model_args", arguments, "--tasks", "colour", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["ept-lm-eval", *command])
    harness.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["colour"]["sample_len"] == len(ROWS)
