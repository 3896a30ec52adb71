"""What a comparison found, as Markdown and a picture: made of the results' file and nothing else."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._compare import chosen_rate
from ._paired import CONFIDENCE, RESAMPLES, paired_difference
from ._picture import COLOURS

# The rows that all others are compared with, where they are there.
REFERENCES = ("euc", "st", "pio3")


def report(found: Mapping[str, Any], command: str, picture: str) -> str:
    """The report in Markdown.

    Args:
        found: what `read_results` gives.
        command: what was typed.
        picture: the picture's path beside the report.
    """
    comparison, trainings = found["comparison"], _asked(found)
    base, rows = comparison["base"], [row for row in comparison["rows"] if _tests(trainings, row)]
    data = Path(base["data"]).name
    limit = "all" if base["limit_train"] is None else base["limit_train"]
    tuned = (
        f"Rates: {_listed(comparison['lrs'])}, chosen for every row by the mean error of {comparison['tuning_seeds']} "
        f"trainings on {comparison['held_out']:.0%} of the training images, held out. The test images were read once "
        "by every training, after its last step."
        if len(comparison["lrs"]) > 1
        else f"Rate: {comparison['lrs'][0]:g} for every row, not tuned."
    )
    lines = [
        f"# {base['model']} on {data}: {len(rows)} rows, {comparison['seeds']} seeds",
        "",
        f"```\n{command}\n```",
        "",
        f"Training images: {limit}; {base['epochs']} epochs in batches of {base['batch_size']}; schedule "
        f"{base['schedule']}; momentum {base['momentum']:g}; weight decay of Euclidean weights "
        f"{base['weight_decay']:g}; augmentation {base['augment']}; γ {base['gamma']}; λ {base['lambda_']}. {tuned}",
        "",
        *_content(found),
        "Errors in percent, mean ± standard deviation over the seeds. Differences are paired by seed, in points, with "
        f"the {CONFIDENCE:.0%} bootstrap interval ({RESAMPLES} resamples) and the p-value of the sign-flip test; they "
        "are not corrected for the number of rows.",
        "",
        *_table(
            ["row", "rate", "test error", "test loss", "training error", "training loss", "ζ > 1, %", "largest ‖v‖/s"],
            (_summary(trainings, comparison, row) for row in rows),
        ),
        "",
    ]
    # A baseline of other options may be the one to beat.
    for reference in [row for row in rows if row in REFERENCES or row.startswith("euc~")]:
        others = [row for row in rows if row != reference]
        if others:
            lines += [
                f"## Test error less that of `{reference}`",
                "",
                *_table(
                    ["row", "difference", "interval", "p"], (_against(trainings, row, reference) for row in others)
                ),
                "",
            ]
    changed = [(row, row.split("~")[0]) for row in rows if row.split("~")[0] in rows and "~" in row]
    if changed:
        lines += [
            "## What one option changes: test error less that of the row without it",
            "",
            *_table(["row", "difference", "interval", "p"], (_against(trainings, *pair) for pair in changed)),
            "",
        ]
    grid = [row for row in rows if len(comparison["lrs"]) > 1]
    if grid:
        lines += [
            "## The search: mean error on the images held out",
            "",
            *_table(
                ["row", *(f"{lr:g}" for lr in comparison["lrs"])],
                ([row, *(_mean(_tuned(trainings, row, lr)) for lr in comparison["lrs"])] for row in grid),
            ),
            "",
        ]
    worst = [t["violation"] for t in trainings if t.get("violation") is not None]
    if worst:
        lines += [f"Largest violation of all trainings: {max(worst):.1e}.", ""]
    lines += [
        f"![Training error over the epochs, and the test errors]({picture})",
        "",
        _versions(found["versions"]) + ".",
        "",
        *_other_versions(trainings),
    ]
    return "\n".join(lines)


def _content(found: Mapping[str, Any]) -> list[str]:
    """What the data were, by their checksums; nothing of results that are older than these."""
    if "data" not in found:
        return []
    parts = (
        f"{found['data'][split]['shape'][0]} {words} images (checksum {found['data'][split]['crc32']:08x})"
        for split, words in (("train", "training"), ("test", "test"))
    )
    return [f"Data: {' and '.join(parts)} of {len(found['data']['classes'])} classes.", ""]


def _other_versions(trainings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The versions of trainings that were added under others than the first."""
    others: dict[str, list[str]] = {}
    for training in trainings:
        if "versions" in training:
            rows = others.setdefault(_versions(training["versions"]), [])
            if training["row"] not in rows:
                rows.append(training["row"])
    return [line for made, rows in others.items() for line in (f"Trainings of {', '.join(rows)} in part: {made}.", "")]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The rows' training error over the epochs, and the test error of each seed."""
    comparison, trainings = found["comparison"], _asked(found)
    rows = [row for row in comparison["rows"] if _tests(trainings, row)]
    # A line of the legend, and one of the test errors, for every row.
    figure = Figure(figsize=(13, max(4.5, 1 + 0.25 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    epochs, tests = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        colour, style = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        errors = np.array([_numbers(t["train_error"]) for t in _tests(trainings, row)])
        axis = range(1, errors.shape[1] + 1)
        epochs.plot(axis, np.mean(errors, axis=0), style, color=colour, label=row)
        tested = np.array(_numbers(t["error"] for t in _tests(trainings, row)))
        tests.plot(tested, np.full(len(tested), number), "o", color=colour, alpha=0.4)
        tests.plot([tested.mean()] * 2, [number - 0.4, number + 0.4], color=colour, linewidth=3)
    epochs.set(xlabel="epoch", ylabel="%", title="Training error, mean over the seeds")
    epochs.set_yscale("symlog", linthresh=1)
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    epochs.set_yticks(ticks)
    # Down to what the rows reach. A training that diverged has no numbers.
    lowest = min((error for line in epochs.lines for error in line.get_ydata() if error >= 0), default=0)
    epochs.set_ylim(max(tick for tick in ticks[:-1] if tick <= lowest), 100)
    epochs.yaxis.set_major_formatter("{x:g}")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", fontsize="small")
    tests.set(xlabel="%", title="Test error: every seed, and the mean")
    tests.set_yticks(range(len(rows)), rows)
    tests.invert_yaxis()
    for axes in (epochs, tests):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _summary(trainings: list[Any], comparison: Mapping[str, Any], row: str) -> list[str]:
    runs = _tests(trainings, row)
    last = {name: [run[name][-1] for run in runs] for name in ("train_error", "train_loss")}
    return [
        row,
        f"{chosen_rate(comparison['lrs'], row, trainings):g}",
        _spread([run["error"] for run in runs], 2),
        _spread([run["loss"] for run in runs], 4),
        _spread(last["train_error"], 2),
        _spread(last["train_loss"], 4),
        _of_constrained(runs, "zeta_share", lambda shares: f"{100 * np.mean(shares):.1f}"),
        _of_constrained(runs, "step_ratio", lambda ratios: f"{max(ratios):.2g}"),
    ]


def _of_constrained(runs: list[Any], name: str, shown: Callable[[list[float]], str]) -> str:
    return "—" if runs[0].get(name) is None else shown([run[name] for run in runs])


def _against(trainings: list[Any], row: str, reference: str) -> list[str]:
    mine, others = ({t["seed"]: t["error"] for t in _tests(trainings, name)} for name in (row, reference))
    seeds = sorted(mine.keys() & others.keys())
    x, y = (np.array([errors[seed] for seed in seeds]) for errors in (mine, others))
    found = paired_difference(x, y)
    interval = "—" if math.isnan(found.lower) else f"{found.lower:+.2f} to {found.upper:+.2f}"
    p = "—" if math.isnan(found.p) else "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
    return [row, f"{found.mean:+.2f}", interval, p]


def _asked(found: Mapping[str, Any]) -> list[Any]:
    """The trainings without the seeds that another command added."""
    seeds = found["comparison"]["seeds"]
    return [t for t in found["trainings"] if t["stage"] == "tuning" or t["seed"] < seeds]


def _tests(trainings: list[Any], row: str) -> list[Any]:
    return [t for t in trainings if (t["row"], t["stage"]) == (row, "test")]


def _tuned(trainings: list[Any], row: str, lr: float) -> list[float]:
    return _numbers(t["error"] for t in trainings if (t["row"], t["stage"], t["lr"]) == (row, "tuning", lr))


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "—"


def _spread(values: Iterable[float | None], digits: int) -> str:
    numbers = _numbers(values)
    deviation = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
