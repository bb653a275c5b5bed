"""For any input a right answer or one of our errors: never another exception, never a silent change."""

import configparser
import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ept.data.loading import load_task
from ept.data.task_files import read_task
from ept.data.tasks import SPLITS, TASKS, Task
from ept.grid.profiles import Profile, load_profile
from ept.utils.files import write_atomic
from ept.utils.reading import read_json, read_yaml
from ept.utils.settings import load_settings
from tests.test_repository import ALL_KINDS

OURS = (ValueError, FileNotFoundError)
cheap = settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

words = st.sampled_from(
    ["", " ", "a", "0", "-1", "1.0", "1_0", "010", "nan", "no", "sad", "glad", "\u0663", "\ud800", "a\nb", "x; touch y", "${a}", "../a", "/", "%(a)s", "a: b", "é"]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 1.5])
scalars = st.none() | st.booleans() | numbers | words | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(), inner, max_size=3), max_leaves=6)


def ours(error):
    """Whether an error is a sentence for people: not one that Python or a library has raised by itself."""
    said = str(error)
    foreign = r"^\[Errno|codec can't|invalid literal|could not convert|not supported between|object is not|unhashable|embedded null|ambiguous|same length|scalar values"
    return type(error) in (ValueError, FileNotFoundError) and len(said) > 10 and not re.search(foreign, said)


def answer(call):
    """What a call returns; None where it raises one of our errors."""
    try:
        return call()
    except OURS as error:
        assert ours(error), repr(error)
        return None


# ---- tables ---------------------------------------------------------------------------------------------------------------

MOODS = Task("moods", ["text"], ["sad", "glad"])
CHATS = Task("chats", ["text", "reply"], ["1", "2", "3"], ["accuracy", "exact_match"], may_be_empty=["reply"], group="day")
SCORES = Task("scores", ["text"], ["0.0", "0.5", "1.0"], ["pearson"], regression=True)
cells = (
    scalars | st.just(pd.NA) | st.just(pd.NaT) | st.just(pd.Timestamp("2024-01-31")) | st.binary(max_size=3) | st.lists(words, max_size=2) | st.tuples(words) | st.just({"a": 1})
)
labels = st.sampled_from(["sad", "glad", 0, 1, 1.0, "1.0", True, np.int64(1), np.float32(0.5), "1", "2", 3, 0.5, "0.25", " glad "]) | cells


def same(task, given, found):
    """Whether prepared rows are the given ones: every text as it was, every label what it says, nothing lost, doubled or moved."""
    rows = [row for split in SPLITS for row in found[split].to_list()]
    assert len(rows) == len(given)
    number = {}
    for row in given:
        text = tuple("" if pd.isna(row[field]) else str(row[field]) for field in task.fields)
        number.setdefault(text, []).append(row)
    for row in rows:
        meant = number[tuple(row[field] for field in task.fields)]
        assert any(says(task, other["label"], row["label"]) and (not task.group or str(other[task.group]) == str(row[task.group])) for other in meant)
    if task.group:
        days = [{str(value) for value in found[split][task.group]} for split in SPLITS]
        assert sum(map(len, days)) == len(set.union(*days)), "a group is in one split"
    return True


def says(task, said, number):
    """Whether what was given as a label is the label of this number."""
    if task.regression:
        return np.float32(said) == np.float32(number)
    text, name = re.sub(r"\.0+$", "", str(said).strip()), task.labels[number]
    return text == name or (not name.isdecimal() and text in (str(number), str(bool(number))))


@pytest.mark.parametrize("task", [MOODS, CHATS, SCORES], ids=lambda task: task.name)
@cheap
@given(data=st.data())
def test_a_table_is_taken_as_it_is_or_refused(task, data):
    day = {task.group: st.sampled_from(["1", 1, 2, 1.0, "a", None, [1]])} if task.group else {}
    strange = st.fixed_dictionaries({**dict.fromkeys(task.fields, words | st.text(max_size=4) | cells), "label": labels, **day})
    rows = [{**dict.fromkeys(task.fields, f"row {i}"), "label": 1, **dict.fromkeys(day, i)} for i in range(20)] + data.draw(st.lists(strange, max_size=2))
    frame = pd.DataFrame(rows, dtype=object) if data.draw(st.booleans()) else rows
    found = answer(lambda: load_task(task, frame))
    assert found is None or same(task, rows, found)


columns = st.dictionaries(st.sampled_from(["text", "label", "a", "", " text"]), st.lists(cells, min_size=2, max_size=2), max_size=3)
tables = columns.map(lambda found: pd.DataFrame(found, dtype=object))


@cheap
@given(source=values | st.binary(max_size=9) | tables)
def test_no_other_thing_is_taken_for_a_table(source):
    assert source is None or answer(lambda: load_task(MOODS, source)) is None


ROWS = "".join(f'"row {i}",sad\n' for i in range(20))
lines = st.lists(st.sampled_from([ROWS, '"a,b",glad\n', "a,b,c\n", "a\n", '"\n', '"a ""b""",1\r\n', "\n", " ,sad\n", "NA,1\n", "\x00,sad\n", "é,2\n"]), max_size=4)
heads = st.sampled_from(["text,label\n", "text,label,text\n", "text,label,label\n", "text;label\n", "\ufefftext,label\n", "label,text\n", ""])


@cheap
@given(head=heads, body=lines, encoding=st.sampled_from(["utf-8", "latin-1", "utf-16"]))
def test_a_csv_file_is_taken_as_it_is_or_refused(tmp_path_factory, head, body, encoding):
    text = "".join([head, *body])
    file = tmp_path_factory.getbasetemp() / "moods.csv"
    try:
        file.write_bytes(text.encode(encoding))
    except UnicodeEncodeError:
        return
    found = answer(lambda: load_task(MOODS, file))
    if found is not None:
        head, *body = [row for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")) if row]
        assert sorted(head) == ["label", "text"] and all(len(row) == 2 for row in body), "no cell is dropped or moved"
        same(MOODS, [dict(zip(head, row)) for row in body], found)


records = values | st.fixed_dictionaries({"text": words | st.integers() | st.lists(words, max_size=2), "label": words})


@cheap
@given(content=st.lists(records, max_size=3), lines=st.booleans(), cut=st.integers(0, 9))
def test_a_json_file_is_taken_as_it_is_or_refused(tmp_path_factory, content, lines, cut):
    file = tmp_path_factory.getbasetemp() / ("moods.jsonl" if lines else "moods.json")
    text = "\n".join(json.dumps(record) for record in content) if lines else json.dumps(content)
    file.write_text(text[: len(text) - cut])
    answer(lambda: load_task(MOODS, file))


# ---- task files, parameters, settings ---------------------------------------------------------------------------------------

TASK = {"fields": ["text"], "labels": ["sad", "glad"], "metrics": ["accuracy"], "data": {"file": "moods.csv", "seed": "7"}}


def mutated(base):
    """A mapping in which one or two entries, somewhere, are others, or are gone, or are new."""

    def paths(value, before=()):
        yield before
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield from paths(inner, (*before, key))

    @st.composite
    def change(draw):
        found = json.loads(json.dumps(base))
        for _ in range(draw(st.integers(1, 2))):
            path = draw(st.sampled_from([path for path in paths(base) if path]))
            place = found
            for key in path[:-1]:
                place = place.get(key) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                continue
            match draw(st.sampled_from(["set", "set", "set", "drop", "add"])):
                case "set":
                    place[path[-1]] = draw(values)
                case "drop":
                    place.pop(path[-1], None)
                case "add":
                    place[draw(words | st.sampled_from([*map(str, path)]))] = draw(values)
        return found

    return change()


def dumped(found):
    """A mapping as YAML, as far as it can be."""
    try:
        return yaml.safe_dump(found, allow_unicode=False, sort_keys=False).encode()
    except (yaml.YAMLError, UnicodeEncodeError, ValueError):
        return json.dumps(found).encode()


@cheap
@given(found=mutated(TASK))
def test_a_task_file_is_a_task_or_refused(tmp_path_factory, found):
    file = write_atomic(tmp_path_factory.getbasetemp() / "task" / "moods.yaml", dumped(found))
    task = answer(lambda: read_task(file))
    if task is not None:
        assert list(task.fields) == [str(field) for field in found["fields"]] or "1.0" in str(found), "texts as they are written"
        answer(lambda: load_task(task))


@settings(parent=cheap, max_examples=60)
@given(found=mutated(yaml.safe_load(ALL_KINDS)))
def test_a_profile_is_what_its_file_says_or_refused(tmp_path_factory, found):
    folder = tmp_path_factory.getbasetemp() / "profile"
    write_atomic(folder / "settings.ini", "")
    profile = answer(lambda: load_profile(write_atomic(folder / "params.yaml", dumped(found))))
    if profile is None:
        return
    assert isinstance(profile, Profile) and profile.profile == found["profile"]
    assert list(profile.grid.tasks) == list(found["tasks"]) and set(profile.grid.tasks) <= set(TASKS)
    for group in ("grid", "search", "sweep"):
        for name, given_list in (found.get(group) or {}).items():
            if isinstance(given_list, list) and name not in ("methods", "tasks"):
                assert json.dumps(list(getattr(getattr(profile, group), name))) == json.dumps(given_list), "no number is read as another"
    for name in (profile.profile, *profile.grid.methods, *profile.prepared, *profile.sweep.sizes):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), "nothing that a shell would read"
    for folder in (profile.backbone.folder, profile.backbone.update, profile.data.folder):
        assert folder is None or (".." not in folder.split("/") and not folder.startswith("/") and folder.isprintable())


names = st.sampled_from(["device", "Device", "precision", "threads", "workers", "data_folder", "data_source", "devise", "a"])
entries = st.tuples(names, st.sampled_from(["=", ":", " "]), words | st.sampled_from(["cpu", "cuda:1", "2"])).map(lambda entry: " ".join(entry) + "\n")
ini = st.lists(st.sampled_from(["[run]\n", "[cluster]\n", "[run\n", "[]\n", "[DEFAULT]\n", "# %\n", "  x\n", "=\n"]) | entries, max_size=5).map("".join)


@cheap
@given(text=ini)
def test_settings_are_what_their_file_says_or_refused(tmp_path_factory, text):
    try:
        content = text.encode()
    except UnicodeEncodeError:
        content = text.encode("utf-16", "surrogatepass")
    found = answer(lambda: load_settings(write_atomic(tmp_path_factory.getbasetemp() / "settings" / "settings.ini", content)))
    if found is not None:
        parser = configparser.RawConfigParser()
        parser.read_string(text)
        for name, value in (parser["run"] if parser.has_section("run") else {}).items():
            assert str(getattr(found, name)) == value or float(getattr(found, name)) == float(value)


signs = st.lists(st.sampled_from(list("{}[]:,-&*!?|>'\"%@` \n\t#a1.")), max_size=12).map(lambda letters: "".join(letters).encode())
letters = st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))


@cheap
@given(content=st.binary(max_size=20) | letters | signs)
def test_a_file_is_a_mapping_or_refused(tmp_path_factory, content):
    file = write_atomic(tmp_path_factory.getbasetemp() / "reading" / "file", content)
    for read in (read_yaml, lambda file: read_yaml(file, texts=True), lambda file: read_json(file, "make it anew")):
        found = answer(lambda read=read: read(file))
        assert found is None or isinstance(found, dict)
