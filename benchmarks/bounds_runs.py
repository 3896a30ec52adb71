"""Errors and bounds of finished runs that logged them (`fgsgd train --report-bounds`), as JSON and a Markdown table."""

import argparse
import json
import math
from pathlib import Path

from fgsgd_jax.experiments import MetricsLog

PAPERS = ("neyshabur_2015", "bartlett_2017", "neyshabur_2018")


def last(folder: Path) -> dict:
    """What the run was and what its last epoch logged. Logarithms are natural."""
    header, records = MetricsLog(folder / "metrics.jsonl").read()
    record = records[-1]
    return {
        "options": header["config"] | {"data": Path(header["config"]["data"]).name},
        "content": header["data"],
        "versions": header["versions"],
        "epoch": record["epoch"],
        "bounds": record["bounds"],
    }


def decimal(natural: float | None) -> str:
    return "∞" if natural is None else f"{natural / math.log(10):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = [last(folder) for folder in options.runs]
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    for run in found:
        bounds = run["bounds"]
        cells = [
            run["options"]["scheme"],
            f"{bounds['train_error']:.2f} / {bounds['test_error']:.2f} %",
            f"{bounds['gap']:.2f}",
            decimal(bounds["log_lipschitz"]),
            *(decimal(bounds["log"]["papers"][name]) for name in PAPERS),
            f"{min(bounds['certified'].values())} of {bounds['groups']}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
