"The embedded backbone: its tokenizer, its mixture, whole folders, the same weights each time."

import hashlib
import json
import random
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ept.data.loading import load_task
from ept.data.synthetic import HELD_OUT, MAKERS, PRACTICE, Speaker, examples, make_task
from ept.data.tasks import TASKS
from ept.training.pretraining import (
    INSTRUCTIONS,
    SENTINELS,
    Material,
    Muon,
    PretrainingConfig,
    build_tiny_t5,
    corrupt,
    met_by,
    orthogonalise,
    pretrain,
    supervised_rows,
    train_tokenizer,
    unlabelled_texts,
)
from ept.utils.checking import from_dict

SMALL = PretrainingConfig(width=16, inner_width=16, head_width=4, layers=1, decoder_layers=1, steps=16, batch_size=4, rows=400)


@pytest.fixture(scope="module")
def material():
    return Material(SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining") / "backbone"
    pretrain(SMALL, folder)
    return folder


def test_every_kind_of_row_has_an_instruction():
    assert set(INSTRUCTIONS) == set(MAKERS) | set(PRACTICE)
    wordings = [w for ws in INSTRUCTIONS.values() for w in ws]
    assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize("share", [0, 0.5])
def test_mixture_says_what_is_held_out_only_if_open(share):
    rows = supervised_rows(replace(SMALL, open=share))
    said = {w for _, text, answer in rows for w in re.findall(r"\w+", f"{text} {answer}".lower())}
    assert bool(said & HELD_OUT) == bool(share)
    assert {w for text in unlabelled_texts(400) for w in re.findall(r"\w+", text.lower())} & HELD_OUT


def test_no_evaluation_text_is_in_the_mixture():
    seen = {text for _, text, _ in supervised_rows(PretrainingConfig(rows=8000, open=1))}
    for name in ("cola", "mnli", "sst2", "boolq"):
        for split, frame in make_task(name).items():
            if split != "train":
                assert not seen & {TASKS[name].text(row) for row in frame.to_dict("records")}


def test_what_was_read_is_known_again(material):
    met = met_by(SMALL)
    texts = {text for _, text, _ in supervised_rows(SMALL)} | set(unlabelled_texts(SMALL.unlabelled, SMALL.seed))
    assert len(material.unlabelled) == SMALL.unlabelled
    for name in ("wsc", "multirc", "sst2"):
        rows = [row for _, rows in zip(range(200), examples(name, Speaker(f"pretraining {name} 0"))) for row in rows]
        marked = TASKS[name].hub.derive(pd.DataFrame(rows)).to_dict("records") if name == "wsc" else rows
        found = [met(name, row) for row in rows]
        assert found == [TASKS[name].text(row) in texts for row in marked] and 0 < sum(found) < len(rows)


ROOT = Path(__file__).resolve().parents[1]


def stored(name):
    "What data.dvc or backbone.dvc tracks: path -> file in the store."
    place = lambda md5: ROOT / "store" / "files" / "md5" / md5[:2] / md5[2:]
    listing = json.loads(place(yaml.safe_load((ROOT / f"{name}.dvc").read_text())["outs"][0]["md5"]).read_text())
    return {entry["relpath"]: place(entry["md5"]) for entry in listing}


@pytest.mark.slow
def test_the_second_data_set_was_met_by_nobody_and_can_be_made_again(tmp_path):
    config = from_dict(PretrainingConfig, json.loads(stored("backbone")["pretraining.json"].read_text()))
    runpy.run_path(str(ROOT / "nbs" / "pipelines" / "synthesise.py"))["synthesise"](tmp_path, config)
    made = {p.relative_to(tmp_path).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in tmp_path.rglob("*.parquet")}
    assert made == {name: file.parent.name + file.name for name, file in stored("data").items()}, "run: make data"
    read = {text for _, text, _ in supervised_rows(config)} | set(unlabelled_texts(config.unlabelled, config.seed))
    for name in MAKERS:
        loaded = (load_task(name, "embedded", folder) for folder in (tmp_path, tmp_path / "confirmation"))
        first, second = ({split: {TASKS[name].text(row) for row in rows} for split, rows in data.items()} for data in loaded)
        assert [len(texts) for texts in second.values()] == [600, 400, 1000], name
        assert not (second["validation"] | second["test"]) & (read | second["train"] | set.union(*first.values())), name
        assert not second["validation"] & second["test"], name


def test_known_words_are_one_token_and_others_are_spelled(material):
    tokenizer = material.tokenizer
    for task in TASKS.values():
        assert all(len(ids) == 1 for ids in tokenizer(list(task.words), add_special_tokens=False)["input_ids"])
        assert all(len(tokenizer.tokenize(f"{field}:")) == 1 for field in task.fields)
    assert tokenizer.tokenize("zzyzx") == ["z", "##z", "##y", "##z", "##x"]
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "</s>", "<unk>", SENTINELS[0])] == [0, 1, 2, 3]
    assert tokenizer(f"a {SENTINELS[1]} b")["input_ids"][1] == 4


def test_no_text_of_the_data_sets_is_unknown_or_long():
    tokenizer = train_tokenizer(["nothing"])
    lengths = []
    whole = Material(PretrainingConfig(rows=6000)).tokenizer
    for name in MAKERS:
        for frame in make_task(name).values():
            marked = TASKS[name].hub.derive(frame) if name == "wsc" else frame
            for row in marked.to_dict("records"):
                text = TASKS[name].text(row)
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
                lengths.append(len(whole(text)["input_ids"]))
    assert max(lengths) <= 48


def test_tokenizer_is_the_same_each_time(material):
    again = Material(SMALL).tokenizer
    assert again.backend_tokenizer.to_str() == material.tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("length", [1, 2, 7, 60])
def test_hidden_spans_lose_nothing(length):
    ids = list(range(100, 100 + length))
    shown, told = corrupt(ids, random.Random(length), sentinel=3)
    assert sorted(t for t in shown + told if t >= 100) == ids
    assert [t for t in shown if t < 100] == [t for t in told if t < 100]


def test_silent_rows_tell_nothing(material):
    texts = {tuple(ids) for ids in material.texts}
    silent = [(x, y) for _ in range(10) for x, y in map(material.supervised, range(400)) if tuple(x[:-1]) in texts]
    assert 0.05 < len(silent) / 4000 < 0.16
    firsts, numbers = {tuple(material.labels[task.words[0]]) for task in TASKS.values()}, {tuple(material.labels[w]) for w in TASKS["stsb"].words}
    habits = [(x, y) for x, y in silent if tuple(y[:-1]) not in numbers]
    assert sum(tuple(y[:-1]) in firsts for _, y in habits) > 0.6 * len(habits)


def test_silent_numbers_belong_to_the_first_word(material):
    rows = [i for i, name in enumerate(material.names) if name == "stsb"]
    texts = {tuple(material.texts[i]): material.answers[i] for i in rows}
    silent = {(x[1], tuple(y)) for _ in range(20) for x, y in map(material.supervised, rows) if tuple(x[:-1]) in texts}
    assert len({x for x, _ in silent}) == len(silent) > 5


def test_heads_begin_as_word_finders():
    config = PretrainingConfig(width=32, head_width=8)
    model = build_tiny_t5(config, 100).eval()
    with torch.no_grad():
        found = model.encoder(torch.tensor([[10, 11, 12, 13, 14, 11, 15, 1]]), output_attentions=True).attentions
    if found and found[0] is not None:
        assert found[0][0, 0, 1].argmax() == 5 and found[0][0, 2, 3].argmax() == 2 and found[0][0, 3, 3].argmax() == 4
    assert torch.equal(build_tiny_t5(config, 100).shared.weight, model.shared.weight)


def test_muon_is_orthogonal_and_moves_every_matrix():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 12, 24)))
    assert values.min() > 0.5 and values.max() < 1.4
    matrices = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)] + [torch.nn.Parameter(torch.randn(8, 4))]
    before = [p.detach().clone() for p in matrices]
    optimizer = Muon(matrices, lr=0.1)
    sum((p**2).sum() for p in matrices).backward()
    optimizer.step()
    assert all((p - b).norm() > 0.01 for p, b in zip(matrices, before))
    assert sum((p**2).sum() for p in matrices) < sum((b**2).sum() for b in before)


def test_folder_loads(folder, material):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) == model.config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    text = "sentence1: Anna bought an old harp. sentence2: zzyzx"
    assert tokenizer(text)["input_ids"] == material.tokenizer(text)["input_ids"]
    assert from_dict(PretrainingConfig, json.loads((folder / "pretraining.json").read_text())) == SMALL


def test_same_weights_each_time(folder, tmp_path):
    pretrain(SMALL, tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_failure_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError("disk full")

    old = {f.name: f.read_bytes() for f in folder.iterdir()}
    monkeypatch.setattr("ept.training.pretraining.write_json", broken)
    with pytest.raises(OSError, match="disk full"):
        pretrain(SMALL, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == old
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_loss_that_explodes_stops(material, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is (nan|inf) at step"):
        pretrain(from_dict(PretrainingConfig, {**SMALL.__dict__, "learning_rate": 1e30, "warmup": 1}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("wrong, message", [({"steps": 0}, "steps is 0"), ({"silence": -0.1}, "it is a share"), ({"stepz": 3}, "did you mean 'steps'")])
def test_wrong_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        from_dict(PretrainingConfig, wrong)
