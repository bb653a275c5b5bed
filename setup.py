"""The page on PyPI is README.md with whole addresses, for links that start at the repository lead nowhere there; all else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def long_description():
    "README.md with links to files of the repository, and to raw ones where pictures are shown."
    text = (HERE / "README.md").read_text(encoding="utf-8")
    raw = REPOSITORY.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", rf"\1{raw}/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(long_description=long_description(), long_description_content_type="text/markdown")
