"""The README's Python: every block runs alone, as it stands."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120
    # Networks of either kind train in so many lines, imports included.
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 12 for block in BLOCKS)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_block_runs_alone(index, users_settings, capsys):
    names: dict = {}
    exec(compile(BLOCKS[index], "README.md", "exec"), names)
    if index == 0:
        assert "PIO" in capsys.readouterr().out
    params = names["state"].params if "state" in names else names["nnx"].state(names["model"], names["nnx"].Param)
    assert all(float(value) < 1e-6 for value in names["fg"].violation(params, names["plan"]).values())
