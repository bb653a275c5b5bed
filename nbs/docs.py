"""Make the documentation site of the notebooks: the sidebar in reading order, the rest by nbdev and Quarto. `make docs` runs it; the site is `_docs/`."""

import shutil
import sys
from pathlib import Path

import yaml
from nbdev.quarto import nbdev_docs

NOTEBOOKS = Path(__file__).parent
SECTIONS = {  # folder -> its title, in reading order: first what people do with the library, then its wings, bottom up
    "tutorials": "Tutorials",
    "utils": "Tools",
    "data": "Tasks and rows",
    "prompt": "Prompts",
    "model": "Prompts on a backbone",
    "methods": "Methods",
    "training": "Training and evaluation",
    "grid": "Grids of runs",
    "report": "Reports",
    "use": "Prompts in use",
    "workflow": "Running stages",
}


def sidebar():
    "The pages of the site, as Quarto reads them: the start page, and a section for each folder."
    pages = {folder: sorted(path.relative_to(NOTEBOOKS).as_posix() for path in (NOTEBOOKS / folder).glob("*.ipynb")) for folder in SECTIONS}
    return {"website": {"sidebar": {"contents": ["index.ipynb", *({"section": title, "contents": pages[folder]} for folder, title in SECTIONS.items())]}}}


def main():
    "Write the sidebar, then the site."
    (NOTEBOOKS / "sidebar.yml").write_text(yaml.safe_dump(sidebar(), sort_keys=False), encoding="utf-8")
    if shutil.which("quarto") is None:  # nbdev would download it and ask for the password of root
        sys.exit("Quarto is not installed, and it makes the pages; get it from https://quarto.org/docs/get-started, then run this again")
    nbdev_docs()


if __name__ == "__main__":
    main()
