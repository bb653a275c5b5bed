"""Outputs of notebooks: what is kept, what counts as a difference, what must not be shown."""

import base64
import struct
import zlib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import execute
import forks

ROOT = Path(__file__).resolve().parents[1]


def png(width, height):
    """A grey picture."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(height)))
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


def result(**data):
    return new_output("execute_result", {kind.replace("_", "/"): content for kind, content in data.items()})


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def notebook(*outputs):
    """A notebook of one cell that shows something."""
    return new_notebook(cells=[new_code_cell("value", id="a", outputs=list(outputs))])


def compare(was, now):
    return execute.differences(notebook(*was), notebook(*now), {"a"})


# ---- what is the same ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("tensor([0.2500, 0.7500])", "tensor([0.2501, 0.7499])"),
        ("loss 6.0516", "loss 6.0490"),
        ("[0.1, -0.2]", "[ 0.1,  -0.2]"),
        ("tensor([[1.0000, 2.0000],\n        [3.0000, 4.0000]])", "tensor([[1.0000, 2.0000], [3.0000, 4.0000]])"),
        ("gap 2.3842e-07", "gap 0."),
        ("1.2e-3", "0.0012"),
        ("score 84.0", "score 84.1"),
        ("0.05", "0.06"),  # one in the last digit that is shown
        ("nan", "nan"),
    ],
)
def test_another_processor_is_no_difference(was, now):
    assert compare([result(text_plain=was)], [result(text_plain=now)]) == []


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("76033", "76034"),
        ("tensor([0.2500])", "tensor([0.2600])"),
        ("0.25", "-0.25"),
        ("score 84.0", "score 86.0"),
        ("{'qnli': 1.0}", "{'qqp': 1.0}"),
        ("nan", "0.5"),
        ("[1.0, 2.0]", "[1.0, 2.0, 3.0]"),
        ("2e-05", "2e-03"),
        ("", "0.5"),
    ],
)
def test_a_changed_value_is_a_difference(was, now):
    for kind in ("text_plain", "text_html", "text_markdown"):
        (found,) = compare([result(**{kind: was})], [result(**{kind: now})])
        assert "cell 0 (a), 'value'" in found and was in found and now in found


def test_a_changed_number_in_a_table_is_named_by_its_line():
    table = "<tr>\n<td>{}</td>\n<td>same</td>\n</tr>".format
    (found,) = compare([result(text_html=table(3))], [result(text_html=table(4))])
    assert "<td>3</td>" in found and "<td>4</td>" in found and "same" not in found


def test_what_is_printed_counts():
    assert compare([printed("one\n")], [printed("one\n")]) == []
    assert compare([printed("one\n")], [printed("two\n")])


def test_a_picture_may_look_different_but_is_there_in_its_size():
    picture = lambda *size: result(image_png=png(*size), text_plain="<Figure>")
    assert compare([picture(100, 60)], [picture(104, 57)]) == []
    (found,) = compare([picture(100, 60)], [picture(100, 90)])
    assert "the picture was 100 x 60 and is now 100 x 90" in found
    (found,) = compare([picture(100, 60)], [result(text_plain="<Figure>")])
    assert "showed image/png, text/plain and shows now text/plain" in found


def test_the_size_of_an_svg_is_that_of_its_view():
    drawn = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="10pt" viewBox="0 0 {} 20"></svg>'.format
    assert compare([new_output("display_data", {"image/svg+xml": drawn(10.5)})], [new_output("display_data", {"image/svg+xml": drawn(10.0)})]) == []
    assert compare([new_output("display_data", {"image/svg+xml": drawn(10)})], [new_output("display_data", {"image/svg+xml": drawn(30)})])


@pytest.mark.parametrize(("was", "now"), [([], ["3"]), (["3"], []), (["3"], ["3", "4"])])
def test_an_output_more_or_less_is_a_difference(was, now):
    assert compare([result(text_plain=text) for text in was], [result(text_plain=text) for text in now])


def test_a_cell_that_was_not_executed_is_not_compared():
    assert execute.differences(notebook(result(text_plain="1")), notebook(), executed=set()) == []


# ---- what is kept -------------------------------------------------------------------------------------------------------


def test_libraries_that_talk_and_bars_that_move_are_not_kept():
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "  0%|"})
    outputs = [printed("a warning", "stderr"), printed("one\n"), printed("two\n"), widget, result(text_plain="3", application_json="3")]
    text, value = execute.shown(outputs)
    assert text.text == "one\ntwo\n" and value.data == {"text/plain": "3"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<Model at 0x7f3a5c2b1d90>", "an address"),
        (f"PosixPath('{Path('/', 'home', 'anna', 'run')}')", "a path"),
        (str(Path("/", "tmp", "colour")), "a path"),
        ("C:\\Users", "a path"),
        ("tmpn4htlpdu/colour", "a temporary file"),
        ("2024-05-01 10:00:00", "a time"),
        (" 50%|#####     | 1/2 [00:01<00:01, 3it/s]", "a progress bar"),
        ("UserWarning: deprecated", "a warning"),
    ],
)
def test_what_is_another_one_tomorrow_is_refused(text, what):
    found = execute.volatile(notebook(printed(text)))
    assert any(what in sentence for sentence in found) and all("cell 0 (a)" in sentence for sentence in found)


def test_ordinary_outputs_are_not_refused():
    for text in ("score 84.0 of 100 at step 2024", "a/b, train/validation", "data/glue/train.parquet", "tmp", "50% of 0x10", "12:30"):
        assert execute.volatile(notebook(printed(text))) == [], text


# ---- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A notebook with a value, a picture, a cell that is slow and one that is hidden."""
    sources = {
        "value": "1 / 3",
        "shape": "#| hide\n%matplotlib inline\n'nobody is to see this'",
        "drawn": "from matplotlib.figure import Figure\nfigure = Figure(figsize=(2, 1))\nfigure.subplots().plot([1, 2])\nfigure",
        "slow": "#| slow\nraise SystemError('executed')",
        "where": "from pathlib import Path\nPath.cwd().name",
        "bar": "import sys, tqdm\nfor _ in tqdm.tqdm(range(2)): print('said', file=sys.stderr)",
    }
    book = new_notebook(cells=[new_code_cell(source, id=name) for name, source in sources.items()])
    book.cells[3].outputs = [printed("kept\n")]
    (tmp_path / "pyproject.toml").write_text('[tool.nbdev]\nlib_path = "lib"\ntst_flags = "notest slow"\n[project]\nname = "small"\n')
    path = tmp_path / "nbs" / "00_small.ipynb"
    path.parent.mkdir()
    nbformat.write(book, path)
    return path


def call(*arguments):
    return forks.run(ROOT / "nbs" / "execute.py", *arguments, cwd=ROOT)


def test_outputs_are_written_and_found_again(small):
    done = call(small)
    assert done.returncode == 1 and "cell 0 (value), '1 / 3'" in done.stdout and "showed nothing" in done.stdout, done.stderr
    assert call(small, "--write").returncode == 0
    cells = {cell.id: cell for cell in nbformat.read(small, as_version=4).cells}
    assert cells["value"].outputs[0].data["text/plain"].startswith("0.333")
    assert "image/png" in cells["drawn"].outputs[0].data and cells["where"].outputs[0].data["text/plain"] == "'nbs'"
    assert cells["slow"].outputs[0].text == "kept\n", "a cell that is not executed keeps its outputs"
    assert not cells["shape"].outputs and not cells["bar"].outputs
    assert all(cell.execution_count is None for cell in cells.values())

    once = small.read_bytes()
    assert call(small).returncode == 0
    assert call(small, "--write").returncode == 0 and small.read_bytes() == once, "the same bytes each time, pictures too"

    small.write_text(small.read_text().replace("0.333", "0.444"))
    done = call(small)
    assert done.returncode == 1 and "was  0.444" in done.stdout and "now  0.333" in done.stdout


def test_a_notebook_that_fails_names_itself_and_is_left_alone(small):
    small.write_text(small.read_text().replace("1 / 3", "1 / 0"))
    before = small.read_bytes()
    done = call(small, "--write")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout and "00_small.ipynb" in done.stdout
    assert small.read_bytes() == before


def test_no_notebook_is_a_mistake(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 2 and "no notebook to execute in" in done.stderr
