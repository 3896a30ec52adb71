"""Notebooks: kept without outputs, alike at the top, and running from top to bottom without a warning."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "notebooks.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
INSTALLATION = """\
# Installs fgsgd_jax where it is missing: the checkout around this notebook, else the index's. JAX stays as it is.
import importlib.metadata
import importlib.util
import pathlib

if importlib.util.find_spec("fgsgd_jax") is None:
    folders = (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
    source = next((folder for folder in folders if (folder / "fgsgd_jax/__init__.py").exists()), "fgsgd-jax")
    present = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name)]
    pins = " ".join(f"{name}=={importlib.metadata.version(name)}" for name in present)
    %pip install -q "{source}[experiments]" MORE {pins}"""
MORE = {"benchmarks": " riemannax==0.0.3"}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_begins_with_an_installation(path):
    first, second, *_ = nbformat.read(path, as_version=4).cells
    assert re.match(r"# \w", first.source)
    # There is no address that a badge could lead to.
    assert "badge" not in first.source
    assert second.source == INSTALLATION.replace(" MORE", MORE.get(path.stem, ""))


@pytest.mark.parametrize("inside", [True, False], ids=["in a checkout", "elsewhere"])
def test_installs_the_checkout_around_it_and_never_another_jax(path, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent if inside else tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fgsgd_jax" else find_spec(name))
    shell, asked = InteractiveShell(), []
    shell.register_magic_function(asked.append, magic_name="pip")
    shell.run_cell(nbformat.read(path, as_version=4).cells[1].source).raise_error()
    (line,) = asked
    assert f'"{ROOT if inside else "fgsgd-jax"}[experiments]"' in line
    assert f" jax=={jax.__version__} jaxlib==" in line


def test_is_on_the_site(path):
    assert f"`{path.name}`" in (ROOT / "docs/notebooks.md").read_text()


@pytest.mark.slow
def test_runs_from_top_to_bottom(path):
    run = subprocess.run([sys.executable, SCRIPT, path.stem], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert path.stem in run.stdout
    assert run.stderr == ""
