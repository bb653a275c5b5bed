"""The command line does what the library does, says what went wrong in one sentence, and its help teaches; `compare` on a table of one's own."""

import json
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from ept import compare, load_backbone, load_task, task_of_table
from ept.training.config import TrainingConfig
from ept.training.training import complete
from ept.use import comparing
from ept.use.command_line import main, parser
from ept.use.comparing import method_differences, method_scores
from tests.conftest import MODELS, byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["prompt_length=40", "short_length=6", "max_length=64", "spaces=2", "space_width=1", "fusion_width=1", "learning_rate=0.1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a table."""
    folder = tmp_path_factory.mktemp("place")
    MODELS["llama"]().save_pretrained(folder / "model")
    byte_tokenizer(eos=False).save_pretrained(folder / "model")
    rows = [(f"message number {i}", ("billing", "repair")[i % 2], i / 8) for i in range(40)]
    pd.DataFrame(rows, columns=["message", "desk", "stars"]).to_csv(folder / "mail.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def adapter(place):
    """What `ept train` makes of the table."""
    options = ["--text", "message", "--label", "desk", "--backbone", str(place / "model"), "--out", str(place / "desk")]
    assert main(["train", str(place / "mail.csv"), *options, "--steps", "2", "--batch-size", "2", "--set", *SIZES]) == 0
    return place / "desk"


def said(capsys, *arguments):
    """What a command shows, when it succeeds."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_what_was_trained_can_be_looked_at(adapter, capsys):
    shown = said(capsys, "info", adapter)
    record = json.loads((adapter / "evaluation.json").read_text())["scores"][0]
    assert "mail: message -> billing, repair" in shown and f"accuracy {record['value']:.1f}" in shown and "n = 4" in shown
    assert "Which one: billing or repair?" in shown
    assert json.loads((adapter / "training.json").read_text())["training"]["learning_rate"] == 0.1


def test_the_scores_are_those_of_the_rows_that_were_held_out(adapter, place, capsys):
    record = json.loads((adapter / "evaluation.json").read_text())["scores"][0]
    shown = said(capsys, "evaluate", adapter, place / "mail.csv", "--label", "desk")
    assert f"(test, n = 4): accuracy {record['value']:.1f}" in shown and f"a constant answer {record['majority']:.1f}" in shown
    whole = said(capsys, "evaluate", adapter, place / "mail.csv", "--label", "desk", "--all")
    assert "n = 40" in whole and "constant" not in whole, "the training rows are not known of another table"


def test_predictions_stand_beside_the_rows(adapter, place, capsys):
    said(capsys, "predict", adapter, place / "mail.csv", "--out", place / "answers.csv")
    answers, rows = pd.read_csv(place / "answers.csv"), pd.read_csv(place / "mail.csv")
    assert answers[rows.columns].equals(rows) and list(answers.columns) == [*rows.columns, "prediction", "probability"]
    shown = said(capsys, "predict", adapter, "--text", rows.message[0], rows.message[1]).splitlines()
    assert shown[0] == "message,prediction,probability" and [line.split(",")[1] for line in shown[1:]] == answers.prediction[:2].tolist()


def test_numbers_are_predicted_as_numbers(place, capsys):
    options = ["--text", "message", "--label", "stars", "--regression", "--backbone", place / "model", "--out", place / "stars"]
    assert "pearson" in said(capsys, "train", place / "mail.csv", *options, "--steps", "1", "--batch-size", "2", "--set", *SIZES)
    shown = said(capsys, "predict", place / "stars", "--text", "message number 3").splitlines()
    assert shown[0] == "message,prediction" and 0 <= float(shown[1].split(",")[1]) <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train {0}/mail.csv --text text --label desk --backbone {0}/model", "column 'text' is missing; the columns are ['message', 'desk', 'stars']"),
        ("train {0}/mail.csv --text message --label desk --backbone {0}/model --set stpes=3", "unknown setting 'stpes'; did you mean 'steps'?"),
        ("train {0}/mail.csv --text message --label desk --backbone {0}/model --method etp", "unknown method 'etp'; did you mean 'ept'?"),
        ("compare {0}/mail.csv --text message --label desk --backbone {0}/model --methods ept,mpt", "'mpt' starts from prompts of other tasks"),
        ("predict {0}/nothing --text a", "/nothing' is no folder here, and the hub does not deliver it"),
        ("predict {0}/desk {0}/mail.csv --text a", "give either a table, or --text"),
        ("evaluate {0}/desk {0}/mail.csv", "column 'label' is missing, which holds the labels"),
        ("evaluate me/desk {0}/mail.csv --save", "--save writes beside the adapter, and me/desk is no folder here"),
    ],
)
def test_an_error_is_one_sentence(adapter, place, capsys, arguments, message):
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    capsys.readouterr()
    assert main(arguments.format(place).split()) == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


def test_help_teaches_every_command(capsys):
    (commands,) = (action for action in parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict))
    assert list(commands.choices) == ["train", "evaluate", "predict", "compare", "info", "push"]
    for name, command in commands.choices.items():
        text = command.format_help()
        assert f"  ept {name} " in text.partition("example")[2] and "in Python: ept." in text
        assert all(action.help for action in command._actions), name
        (example,) = [line.split()[1:] for line in text.splitlines() if line.startswith(f"  ept {name} ")][:1]
        assert parser().parse_args(example).command == name, "the example is one that is understood"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["ept"] == "ept.use.command_line:main"


def test_methods_are_compared_on_the_same_rows(place, tmp_path):
    frame = pd.read_csv(place / "mail.csv")
    task = task_of_table(frame, ["message"], "desk", "mail")
    data, backbone = load_task(task, frame, label="desk"), load_backbone(str(place / "model"))
    training, sizes = TrainingConfig(steps=1, batch_size=2, evaluate_every=1), dict(prompt_length=40, short_length=6, max_length=64, spaces=2, space_width=1, fusion_width=1)
    table = compare(task, ["pt", "bitfit"], backbone, data, [0, 1], tmp_path, training, sizes, progress=False)
    scores, differences = method_scores(table), method_differences(table)
    assert list(scores.index) == ["pt", "bitfit"] and set(scores["runs"]) == {2} and set(scores["test rows"]) == {4}
    assert list(differences.index) == ["bitfit"]
    assert differences.difference["bitfit"] == pytest.approx(scores.score["pt"] - scores.score["bitfit"])
    recorded = [json.loads((tmp_path / f"mail-pt-{seed}" / "evaluation.json").read_text())["scores"][0]["value"] for seed in (0, 1)]
    assert scores.score["pt"] == pytest.approx(sum(recorded) / 2)


def test_what_cannot_be_trained_is_said_before_another_method_is_trained(place, tmp_path, monkeypatch):
    frame = pd.read_csv(place / "mail.csv")
    task = task_of_table(frame, ["message"], "desk", "mail")
    data, backbone = load_task(task, frame, label="desk"), load_backbone(str(place / "model"))
    sizes = dict(prompt_length=40, short_length=6, max_length=64, spaces=2, space_width=1, fusion_width=1)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ImportError, match="method 'lora' takes its layers from PEFT, which is not installed; run: pip install"):
        compare(task, ["pt", "lora"], backbone, data, [0], tmp_path, TrainingConfig(steps=1, batch_size=2, evaluate_every=1), sizes, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_was_stopped_trains_no_finished_run_again(place, tmp_path, monkeypatch):
    frame = pd.read_csv(place / "mail.csv")
    task = task_of_table(frame, ["message"], "desk", "mail")
    data, backbone = load_task(task, frame, label="desk"), load_backbone(str(place / "model"))
    sizes, trained = dict(prompt_length=40, short_length=6, max_length=64, spaces=2, space_width=1, fusion_width=1), []

    def train_some(job, folder, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(folder.name)
        return complete(job, folder, **options)

    def run(steps=1, rows=data):
        return compare(task, ["pt", "frozen"], backbone, rows, [0, 1], tmp_path, TrainingConfig(steps=steps, batch_size=2, evaluate_every=1), sizes, progress=False)

    monkeypatch.setattr(comparing, "complete", train_some)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert trained == ["mail-pt-0", "mail-pt-1", "mail-frozen-0"]
    adapter = (tmp_path / "mail-pt-0" / "adapter_model.safetensors").read_bytes()
    trained[:] = [""]
    again = run().runs
    assert trained == ["", "mail-frozen-1"] and (tmp_path / "mail-pt-0" / "adapter_model.safetensors").read_bytes() == adapter
    whole = run().runs
    assert trained == ["", "mail-frozen-1"], "all are finished"
    for column in ("method", "seed", "score", "chosen_step", "trainable_parameters", "train_seconds", "precision"):
        assert whole[column].tolist() == again[column].tolist()
    for changed in (dict(steps=2), dict(rows=data | {"train": data["train"].select(range(20))})):
        trained[:] = ["", ""]
        with pytest.raises(KeyboardInterrupt):
            run(**changed)
        assert trained[2:] == ["mail-pt-0"], "another training, or other rows: nothing is taken over"
