"""PEFT's method comparison in miniature: its parameter files, its rows and its count, made-up sums on a tiny model, a result in its schema."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import metamath  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402

SCHEMA = {  # of a result of PEFT's comparison, what its tables read
    "run_info": {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"},
    "train_info": {
        *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
        *("train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}
VALIDATED = {"step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec", "mem allocated avg", "mem reserved avg", "elapsed time"}


def sums(start, count, end):
    return [(f"What is {i} and {i % 7}?", f"{i} and {i % 7} are {i + i % 7}.{end}{i + i % 7}") for i in range(start, start + count)]


def write(folder, name, pairs, columns):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(dict(zip(columns, pair))) + "\n" for pair in pairs))


@pytest.fixture
def place(tmp_path):
    "A folder of rows, a tiny model, and two parameter files."
    write(tmp_path, "metamath", [*sums(0, 60, "\nThe answer is: "), ("Too long? " + "x" * 1300, "The answer is: 1")], ("query", "response"))
    write(tmp_path, "gsm8k-train", sums(100, 70, "\n#### "), ("question", "answer"))
    write(tmp_path, "gsm8k-test", sums(200, 6, "\n#### "), ("question", "answer"))
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(eos=False).save_pretrained(tmp_path / "model")
    common = {"model_id": str(tmp_path / "model"), "dtype": "bfloat16", "max_steps": 5000, "eval_steps": 250, "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}
    own = {"dtype": "float32", "max_steps": 4, "eval_steps": 2, "batch_size": 3, "max_seq_length": 120, "generation_kwargs": {"max_length": 150, "max_new_tokens": 6}}
    for name, values in (("default_training_params", common), ("training_params", own)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def test_a_run_in_miniature_has_the_schema_of_the_comparison(place, capsys):
    files = [str(place / "default_training_params.json"), str(place / "training_params.json")]
    sizes = '{"prompt_length": 60, "short_length": 4, "max_length": 64}'
    metamath.main(["ept/tiny", "--parameters", *files, "--sizes", sizes, "--rates", '{"prompt": 0.3}', "--rows", str(place), "--output", str(place / "out")])
    result = json.loads((place / "out" / "ept--tiny.json").read_text())
    for part, names in SCHEMA.items():
        assert names <= result[part].keys()
    run, train = result["run_info"], result["train_info"]
    assert run["train_config"]["max_steps"] == 4 and run["train_config"]["optimizer_kwargs"] == {"lr": 1e-4, "weight_decay": 0.1}
    assert run["peft_config"]["rates"]["learning_rate"] == 0.3 and run["peft_config"]["rates"]["pair_learning_rate"] == 1e-4 and run["peft_config"]["short_length"] == 4
    assert [m["step"] for m in train["metrics"]] == [2, 4, 4] and all(m.keys() == VALIDATED for m in train["metrics"][:-1])
    assert train["metrics"][-1]["train samples"] == 12 and 0 <= train["metrics"][-1]["test accuracy"] <= 1 and train["status"] == "success"
    assert 0 < train["num_trainable_params"] <= 60 * 32 < train["num_total_params"] and train["file_size"] > 4 * train["num_trainable_params"]
    assert run["deviations"] and "test accuracy" in capsys.readouterr().out


def test_rows_are_those_of_the_comparison(place):
    rows = metamath.read_rows(place)
    assert {split: len(pairs) for split, pairs in rows.items()} == {"train": 60, "validation": 50, "test": 6}, "the one that is too long is left out"
    assert rows["train"][0][0] == "What is 0 and 0?" and len(set(rows["validation"])) == 50 and rows["validation"] == metamath.read_rows(place)["validation"]


@pytest.mark.parametrize(
    "answer, found",
    [
        ("4^2 = 16.The answer is: 16", 16.0),
        ("So it is 3.\n#### 1/2", 0.5),
        ("The answer is 65.0%.", 65.0),
        ("The answer is: $7.\n\nQuestion: and 8? The rest", 7.0),
        ("The answer is: 3 The answer is: 4", 4.0),
        ("The final answer is: x+1", "x+1"),
        ("The answer is: 1/0", "1/0"),
        ("sixteen", None),
    ],
)
def test_the_final_answer_is_what_stands_behind_the_last_sign(answer, found):
    assert metamath.final_answer(answer) == found


def test_accuracy_counts_equal_numbers():
    responses = ["#### 20", "#### 0.5", "#### 3", "#### 4"]
    assert metamath.accuracy(["The answer is: 20.0", "The answer is: 1/2", "3", "The answer is: 5"], responses) == 0.5
    with pytest.raises(ValueError, match="a response has no final answer"):
        metamath.accuracy(["#### 1"], ["one"])


def test_batches_go_through_the_rows_in_order_and_are_sorted_within_buckets():
    lengths = [i % 13 for i in range(100)]
    found = metamath.batches(lengths, 4, 30)
    assert len(found) == 30 and sorted(sum(found[:20], [])) == list(range(80)) and sorted(sum(found[20:25], [])) == list(range(80, 100))
    assert found[25:] == found[:5], "from the start again"
    flat = [lengths[i] for batch in found[:20] for i in batch]
    assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_amp": True}, "use_amp is True; this script runs False alone"),
        ({"stesp": 1}, "unknown parameter 'stesp'"),
        ({"eval_steps": 6000}, "eval_steps is 6000; it must be at most max_steps, which is 5000"),
    ],
)
def test_parameters_that_cannot_be_kept_are_refused(change, message, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=message):
        metamath.read_parameters([tmp_path / "p.json"])
