"""How long a training step of each row of the comparison on text takes, the rows in turns.

The comparisons' own times are those of a machine that did other things as well; these are comparable.
"""

import argparse
import json
import os
from pathlib import Path

from timing import medians, side_by_side

from fgsgd_jax.experiments._rows import row_config
from fgsgd_jax.experiments._tasks import config_from_dict
from fgsgd_jax.experiments._trainer import Trainer
from fgsgd_jax.experiments._versions import versions

FOLDER = Path(__file__).parent / "results"
STEPS = 5  # to a turn


def program(trainer):
    """A function that trains for a few steps more whenever it is called."""
    state, order = trainer.start(0), trainer.order(trainer.start(0))

    def run():
        nonlocal state
        state = trainer.advance(state, order, STEPS)
        return state.step

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--comparison", type=Path, default=FOLDER / "compare_text_stdlib" / "results.json")
    parser.add_argument("--json", type=Path, default=FOLDER / "text_steps.json")
    options = parser.parse_args()
    comparison = json.loads(options.comparison.read_text())["comparison"]
    base = config_from_dict(comparison["base"])
    data = base.load()
    programs = {row: program(Trainer(row_config(row, base), data)) for row in comparison["rows"]}
    seconds = medians(side_by_side(programs, options.turns))
    found = {
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "model": {name: getattr(base, name) for name in ("layers", "width", "heads", "context", "batch_size")},
        "milliseconds": {row: round(1000 * each / STEPS, 1) for row, each in seconds.items()},
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    for row, each in found["milliseconds"].items():
        print(f"{row:24} {each:6.1f} ms")


if __name__ == "__main__":
    main()
