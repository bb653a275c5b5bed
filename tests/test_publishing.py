"""An adapter goes to the hub with a card that says what its files say, and comes back by its name; the hub is a stand-in on this machine."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import yaml
from datasets import Dataset

from ept import Classifier, EPTModel, Task, TrainingConfig, evaluate, load_backbone, push_to_hub, save_evaluation, train
from ept.methods.registry import build_method
from ept.model.hub import find_adapter
from ept.training.evaluation import Evaluation
from ept.training.purpose import Purpose, read_purpose, write_purpose
from ept.use.card import model_card
from ept.use.records import describe
from tests.conftest import MODELS, byte_tokenizer, tiny_backbone
from tests.hub import TOKEN, Hub

DESK = Task("desk", ("message",), ("billing", "repair", "other"), ("accuracy", "macro_f1"), question="{message}\nWhich desk?\nDesk:")
SIZES = dict(prompt_length=40, short_length=6, max_length=64, spaces=2, space_width=1, fusion_width=1)
COMMIT = "d" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub that this process takes for the real one, logged in."""
    with Hub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A backbone in a folder, the adapter of a training of two steps on it, and the rows."""
    place = tmp_path_factory.mktemp("made")
    MODELS["llama"]().save_pretrained(place / "model")
    byte_tokenizer(eos=False).save_pretrained(place / "model")
    rows = Dataset.from_dict({"message": [f"message number {i}" for i in range(12)], "label": [i % 3 for i in range(12)]})
    data, training = {"train": rows, "validation": rows, "test": rows}, TrainingConfig(steps=2, batch_size=2, evaluate_every=2)
    backbone = load_backbone(str(place / "model"))
    run = train(DESK, "ept", 0, backbone, data, place / "adapter", training=training, sizes=SIZES, progress=False)
    save_evaluation(run.adapter_dir, evaluate(run.adapter_dir, DESK, backbone, data))
    return run.adapter_dir, place / "model", rows


def test_an_adapter_goes_to_the_hub_and_comes_back_by_its_name(hub, made):
    adapter, model, rows = made
    hub.add("own/model", COMMIT, model)
    hub.references["own/model", "main"] = COMMIT
    first = push_to_hub(adapter, "me/desk", backbone="own/model", private=True)
    assert hub.made["me/desk"]["visibility"] == "private"
    there = {path for name, commit, path in hub.files if (name, commit) == ("me/desk", first)}
    assert there == {"README.md", "adapter_config.json", "adapter_model.safetensors", "evaluation.json", "history.csv", "task.json", "training.json"}
    assert not any(str(model).encode() in content for (name, *_), content in hub.files.items() if name == "me/desk"), "no folder of this machine"
    clf = Classifier.from_pretrained("me/desk")
    assert clf.backbone.name == "own/model"
    here = Classifier.from_pretrained(adapter)
    for one, other in zip(clf(rows).itertuples(), here(rows).itertuples()):
        assert one.label == other.label and one.probabilities == other.probabilities
    assert describe("me/desk").evaluation == describe(adapter).evaluation


def test_a_revision_is_kept_when_the_repository_moves_on(hub, made, tmp_path):
    adapter, _, _ = made
    first = push_to_hub(adapter, "me/desk", backbone="own/model")
    backbone = load_backbone(str(made[1]))
    other = build_method("pt", backbone.model, **SIZES)
    other.save_pretrained(tmp_path / "other")
    write_purpose(tmp_path / "other", Purpose.of(DESK, backbone, 64))
    second = push_to_hub(tmp_path / "other", "me/desk", backbone="own/model")
    assert first != second
    kinds = [EPTModel.from_pretrained(backbone.model, "me/desk", revision=revision).prompt_config.fusion for revision in (first, second, None)]
    assert kinds == [True, False, False]
    hub.stop()
    assert find_adapter("me/desk", first).name == first, "what is in the cache needs no hub"


def test_a_page_that_somebody_has_written_is_left_as_it_is(hub, made, tmp_path):
    (tmp_path / "copy").mkdir()
    for file in made[0].iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "README.md").write_text(own := "---\nlicense: mit\n---\n# Mine\n")
    commit = push_to_hub(tmp_path / "copy", "me/desk", backbone="own/model")
    assert hub.files["me/desk", commit, "README.md"].decode() == own


def test_the_folder_is_as_it_was(hub, made):
    before = {file.name: file.read_bytes() for file in made[0].iterdir()}
    push_to_hub(made[0], "me/desk", backbone="own/model")
    assert {file.name: file.read_bytes() for file in made[0].iterdir()} == before


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(hub, made, tmp_path):
    adapter = made[0]
    with pytest.raises(ValueError, match="names its backbone by the folder .*, which nobody else has; give its name on the hub"):
        push_to_hub(adapter, "me/desk")
    (tmp_path / "copy").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is truncated or changed"):
        push_to_hub(tmp_path / "copy", "me/desk", backbone="own/model")
    with pytest.raises(FileNotFoundError, match="is no folder here"):
        push_to_hub(tmp_path / "nowhere", "me/desk", backbone="own/model")
    assert not hub.made and not any(path.startswith("/api/repos") for path in hub.seen)


def test_without_a_login_the_error_says_how_to_get_one(hub, made, monkeypatch):
    with pytest.raises(ConnectionError, match="could not be put on the hub as 'me/desk' .*401.*hf auth login"):
        push_to_hub(made[0], "me/desk", backbone="own/model", token="hf_wrong")
    assert not hub.made and not hub.files


def test_what_the_hub_does_not_have_is_said(hub, made):
    with pytest.raises(FileNotFoundError, match="adapter 'me/nothing' is no folder here, and the hub does not deliver it"):
        Classifier.from_pretrained("me/nothing")
    push_to_hub(made[0], "me/desk", backbone="own/model")
    with pytest.raises(FileNotFoundError, match="does not deliver it at revision 'v9'"):
        find_adapter("me/desk", "v9")


def test_an_adapter_of_the_hub_is_evaluated_as_it_was_trained(hub, made, tmp_path):
    """Its own task, length and wording, which stand in its `task.json`."""
    adapter, model, rows = made
    copy, backbone, data = shutil.copytree(adapter, tmp_path / "copy"), load_backbone(str(model)), {"test": rows}
    write_purpose(copy, replace(read_purpose(copy), max_length=24, verbalizer="digits"))
    push_to_hub(copy, "me/desk", backbone="own/model")
    expected = evaluate(EPTModel.from_pretrained(backbone.model, adapter), DESK, backbone, data, max_length=24, verbalizer="digits")
    seen = []
    for name, task in (("me/desk", None), ("me/desk", DESK), (copy, None)):
        found = evaluate(name, task, backbone, data)
        assert (found.task, found.predictions) == ("desk", expected.predictions)
        seen.append(found.predictions)
    assert evaluate(adapter, DESK, backbone, data).predictions not in seen, "or else nothing was tested"
    with pytest.raises(FileNotFoundError, match="does not deliver it at revision 'v9'"):
        evaluate("me/desk", None, backbone, data, revision="v9")


# ---- the card


def table(card):
    """The scores of a card: metric -> cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")][2:]
    return {metric: cells for metric, *cells in rows}


def test_a_card_says_what_the_record_says(made):
    card, said = model_card(made[0], "me/desk"), describe(made[0])
    record = json.loads((made[0] / "evaluation.json").read_text())
    shown = table(card)
    first, second = record["scores"]
    assert shown["accuracy"] == [f"{first['value']:.1f}", f"{first['low']:.1f} to {first['high']:.1f}", f"{first['majority']:.1f}", "12"]
    assert shown["macro_f1"] == [f"{second['value']:.1f}", "–", "–", "12"]
    assert f"{said.parameters:,} trained numbers" in card and DESK.question in card and all(f"- {label}\n" in card for label in DESK.labels)
    assert f"accuracy {said.training['validation_score']:.1f} at step 2, which was chosen by it" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "ept", "pipeline_tag": "text-classification", "tags": ["ept", "prompt-tuning", "ept"]}, "a folder is no base_model"


def test_a_card_claims_nothing_that_the_record_lacks(tmp_path):
    backbone = tiny_backbone("t5")
    build_method("dept", backbone.model, **SIZES).save_pretrained(tmp_path)
    write_purpose(tmp_path, Purpose.of(DESK, backbone, 64))
    card = model_card(tmp_path, "me/desk")
    assert "It has not been evaluated" in card and not table(card) and "validation" not in card
    assert set(describe(tmp_path).facts()) == {"task", "backbone", "method", "prompt", "size"}
    assert "tiny-t5" in card and DESK.template in card and DESK.question not in card, "the text is that of the backbone's family"


def test_texts_of_a_task_stay_texts(tmp_path):
    backbone = tiny_backbone("llama")
    odd = Task("odd", ("message",), ("a|b", "{{ 7 * 7 }}"), question="```\n---\n{message} {{% if x %}}\nAnswer:")
    build_method("pt", backbone.model, **SIZES).save_pretrained(tmp_path)
    write_purpose(tmp_path, Purpose.of(odd, backbone, 64))
    card = model_card(tmp_path, "me/odd")
    assert f"````text\n{odd.question}\n````" in card and "- {{ 7 * 7 }}\n" in card and "49" not in card.partition("## Scores")[0].partition("What it answers")[2]


def test_a_card_of_a_task_that_is_answered_in_words(tmp_path):
    backbone, task = tiny_backbone("llama"), Task("reply", ("message",), generation=True, answer_tokens=4)
    build_method("pt", backbone.model, **SIZES).save_pretrained(tmp_path)
    write_purpose(tmp_path, Purpose.of(task, backbone, 64))
    found = Evaluation("reply", "test", {"exact_match": 50.0, "token_f1": 60.0, "n": 2}, 50.0, ["yes", "so"], ["yes", "no"])
    save_evaluation(tmp_path, found)
    card = model_card(tmp_path, "me/reply")
    assert "a text of at most 4 tokens" in card and table(card)["exact_match"][0] == "50.0" and "constant answer is" not in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-generation"
