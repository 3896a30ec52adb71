"""The README's Python runs as it stands, from top to bottom."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readme_runs(users_settings, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    # Networks of either kind train in so many lines.
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 12 for block in blocks[:2])
    assert len(README.read_text().splitlines()) <= 120
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "PIO" in capsys.readouterr().out
    assert all(float(value) < 1e-6 for value in names["fg"].violation(names["state"].params, names["plan"]).values())
