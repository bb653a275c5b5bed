"""The update of a backbone that has met the tasks: on rows that no prompt sees, in words that no prompt uses."""

import json
from pathlib import Path

import pytest

from ept.data.loading import load_task
from ept.data.parts import part_of, shared_text
from ept.data.tasks import TASKS
from ept.training.multitask import WORDINGS, WORDS, MultitaskConfig, _hash_rows, bare, wordings

ROOT = Path(__file__).resolve().parents[1]
REAL, UPDATE = ROOT.parent / "shared" / "data", ROOT / "updates" / "smollm2-multitask"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not in ../shared/data")
update = pytest.mark.skipif(not UPDATE.is_dir(), reason="the update is not there; dvc pull brings it")


@pytest.mark.parametrize("name", WORDINGS)
def test_the_mixture_speaks_otherwise_than_prompts(name):
    "No text of a prompt, and none of its label words, is one of the mixture's; a bare text names no task."
    task = TASKS[name]
    row = {field: f"<{field}>" for field in task.fields}
    asked = [wording.text(row, "question") for wording in wordings(name)]
    assert len(set(asked)) == len(asked) == 3 and task.text(row, "question") not in asked
    assert not set(WORDS[name]) & {*task.answers, *task.label_texts("digits", "question")}
    assert all(all(f"<{field}>" in text for field in task.fields) for text in asked)
    assert name not in bare(name).question.replace("{", " ").split() and bare(name).text(row, "question") == f"{task.text(row)}\nAnswer:"


@update
def test_the_update_says_what_it_has_met():
    record = json.loads((UPDATE / "training.json").read_text())
    chosen = record["update"]
    assert list(record["rows"]) == list(chosen["tasks"])
    assert MultitaskConfig(**{**chosen, "tasks": tuple(chosen["tasks"])}) == MultitaskConfig()
    assert json.loads((UPDATE / "adapter_config.json").read_text())["peft_type"] == "LORA"


@real_data
@update
@pytest.mark.parametrize("name", WORDINGS)
def test_no_prompt_sees_a_row_that_the_update_has_met(name):
    "The recorded rows are those of the backbone's part, and share no deciding text with what prompts are trained, validated and tested on."
    recorded = json.loads((UPDATE / "training.json").read_text())["rows"][name]
    met = load_task(name, "local", REAL, part="backbone")["train"]
    assert (recorded["rows"], recorded["hash"]) == (len(met), _hash_rows(met))
    texts = {shared_text(name, row) for row in met}
    prompts = load_task(name, "local", REAL, part="prompts")
    assert not any(shared_text(name, row) in texts for rows in prompts.values() for row in rows)
    assert {part_of(name, row) for row in prompts["train"]} == {"prompts"}
