"""The notebooks: each is executed, and shows what is committed."""

import asyncio
from pathlib import Path

import pytest

import execute

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("notebook", execute.find([ROOT / "nbs"]), ids=lambda path: path.stem)
def test_a_notebook_shows_what_is_committed(notebook):
    """Where the new outputs are right, `make outputs` keeps them."""
    wrong = asyncio.run(execute.treat(notebook, write=False, flags=(), kernel=execute.ForkedKernel))
    assert not wrong, "\n".join(wrong)
