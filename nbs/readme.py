"""Print the README made from `nbs/index.ipynb`: its cells in order, links seen from the repository's root."""

import json
import re
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("index.ipynb")


def block(cell):
    "One cell as Markdown; directives and outputs are left out."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source = re.sub(r"\]\((?!\w+:|\.\./)([^)]+)\)", r"](nbs/\1)", source)
        return re.sub(r"\]\(\.\./", "](", source)
    return "```python\n" + re.sub(r"(?m)^#\| .*\n", "", source) + "\n```"


if __name__ == "__main__":
    print("\n\n".join(block(cell) for cell in json.loads(NOTEBOOK.read_text())["cells"]))
