"""Where the best learning rate of a small GPT lies, over widths.

Two blocks with heads of 32 channels, trained for a hundred steps on the source of Python's standard library. Rates a
factor 2 apart, until the best lies between two others; they are compared on the end of every training file, held out.
"""

import argparse
import json
import time
from pathlib import Path

from widths import optima_table, optimum, rows_of

from fgsgd_jax.experiments import TextConfig, Trainer
from fgsgd_jax.experiments._rows import row_config
from fgsgd_jax.experiments._versions import versions

RESULTS = Path(__file__).parent / "results" / "text_widths.json"
WIDTHS, HEAD = (64, 128, 256), 32
BASE = TextConfig(layers=2, context=64, steps=100, report_every=100, limit_train=4_000_000, validation=0.1)

# Rows with the rate that the search begins at.
ROWS = {"spel": 0.05, "spel:heads": 0.05, "muon-hyperball": 0.05, "hyperball": 0.02, "muon": 0.1, "adamw": 0.02}


def losses(row, width, data, seed=0):
    """The losses by rate, the best of them inside."""
    config = row_config(row, TextConfig(**BASE.to_dict() | {"width": width, "heads": width // HEAD}))
    trainer, found = Trainer(config, data), {}

    def train(rate):
        state = trainer.start(seed, rate)
        state = trainer.advance(state, trainer.order(state), config.steps)
        found[rate], _ = trainer.evaluate(state)

    for rate in (ROWS[row] / 2, ROWS[row], 2 * ROWS[row]):
        train(rate)
    while (best := min(found, key=found.get)) in (min(found), max(found)):
        train(best / 2 if best == min(found) else 2 * best)
    return dict(sorted(found.items()))


def table(rows):
    """The optima, a line for each row, as docs/directions.md shows them."""
    return optima_table(rows, ROWS, WIDTHS, "row")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = BASE.load()
    header = {"versions": versions(), "base": BASE.to_dict(), "data": data.fingerprint()}
    rows = rows_of(options.results, header)
    for width in options.widths:
        for name in options.only:
            start = time.perf_counter()
            found = losses(name, width, data)
            row = {"row": name, "width": width, "optimum": optimum(list(found), list(found.values()))}
            row |= {"rates": list(found), "losses": [round(loss, 5) for loss in found.values()]}
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows = [old for old in rows if (old["row"], old["width"]) != (name, width)] + [row]
            print(
                f"{name}, width {width}: optimum {row['optimum']:.4g}, losses {found}, {row['seconds']} s", flush=True
            )
            options.results.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
