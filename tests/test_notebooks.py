"""Notebooks: kept without outputs, alike at the top, and running from top to bottom without a warning."""

import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "notebooks.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_begins_with_a_badge_and_an_installation(path):
    first, second, *_ = nbformat.read(path, as_version=4).cells
    assert re.match(r"# \w", first.source)
    assert BADGE in first.source
    # Only where the package is missing, so that a clone's own is not replaced.
    assert 'if importlib.util.find_spec("fgsgd_jax") is None:\n    %pip install' in second.source


def test_is_on_the_site(path):
    assert f"`{path.name}`" in (ROOT / "docs/notebooks.md").read_text()


@pytest.mark.slow
def test_runs_from_top_to_bottom(path):
    run = subprocess.run([sys.executable, SCRIPT, path.stem], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert path.stem in run.stdout
    assert run.stderr == ""
