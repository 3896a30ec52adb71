"""What a comparison found, as Markdown and a picture: made of the results' file and nothing else."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._compare import row_grid, row_rate
from ._config import Config
from ._paired import CONFIDENCE, RESAMPLES, paired_difference
from ._picture import COLOURS, ERROR_TICKS
from ._rows import row_rates
from ._tasks import config_from_dict, kind_of


def report(found: Mapping[str, Any], command: str, picture: str) -> str:
    """The report in Markdown.

    Args:
        found: what `read_results` gives.
        command: what was typed.
        picture: the picture's path beside the report.
    """
    comparison, trainings = found["comparison"], asked(found)
    rows = [row for row in comparison["rows"] if _tests(trainings, row)]
    base = config_from_dict(comparison["base"])
    kind = kind_of(base)
    criterion = kind.criterion
    lines = [
        f"# {base.names[1]} on {base.names[0]}: {len(rows)} rows, {comparison['seeds']} seeds",
        "",
        f"```\n{command}\n```",
        "",
        kind.setting(base, comparison),
        "",
        *_content(found),
        f"{kind.figures}, mean ± standard deviation over the seeds. Differences are paired by seed, in "
        f"{kind.differences}, with the {CONFIDENCE:.0%} bootstrap interval ({RESAMPLES} resamples) and the "
        "p-value of the sign-flip test; they are not corrected for the number of rows.",
        "",
        *_table(
            _HEADINGS[criterion],
            (_summary(trainings, comparison, base, row) for row in rows),
        ),
        "",
    ]
    # A baseline of other options may be the one to beat.
    for reference in [row for row in rows if row in kind.references or row.startswith("euc~")]:
        others = [row for row in rows if row != reference]
        if others:
            lines += [
                f"## Test {criterion} less that of `{reference}`",
                "",
                *_table(
                    ["row", "difference", "interval", "p"],
                    (_against(trainings, row, reference, criterion) for row in others),
                ),
                "",
            ]
    changed = [(row, row.split("~")[0]) for row in rows if row.split("~")[0] in rows and "~" in row]
    if changed:
        lines += [
            f"## What one option changes: test {criterion} less that of the row without it",
            "",
            *_table(
                ["row", "difference", "interval", "p"], (_against(trainings, *pair, criterion) for pair in changed)
            ),
            "",
        ]
    if len(comparison["lrs"]) > 1:
        grid = sorted({lr for row in rows for lr in row_grid(row, comparison, trainings)})
        lines += [
            f"## The search: mean {criterion} on the {kind.examples} held out",
            "",
            *_table(
                ["row", *(f"{kind.times}{lr:g}" for lr in grid)],
                (
                    [
                        row,
                        *(
                            _mean(_tuned(trainings, row, lr, criterion), _DIGITS[criterion])
                            for lr in row_rates(grid, row, base)
                        ),
                    ]
                    for row in rows
                ),
            ),
            "",
        ]
    worst = [t["violation"] for t in trainings if t.get("violation") is not None]
    if worst:
        lines += [f"Largest violation of all trainings: {max(worst):.1e}.", ""]
    lines += [
        f"![Training {criterion} over the {kind.stretch}s, and the test "
        f"{'losses' if criterion == 'loss' else 'errors'}]({picture})",
        "",
        _versions(found["versions"]) + ".",
        "",
        *_other_versions(trainings),
    ]
    return "\n".join(lines)


def _scale_of_errors(axes: Axes) -> None:
    """Logarithmic, and linear below 1 %."""
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(ERROR_TICKS)
    # Down to what the rows reach. A training that diverged has no numbers.
    lowest = min(
        (error for line in axes.lines for error in np.asarray(line.get_ydata(), float) if error >= 0), default=0
    )
    axes.set_ylim(max(tick for tick in ERROR_TICKS[:-1] if tick <= lowest), 100)
    axes.yaxis.set_major_formatter("{x:g}")


_HEADINGS = {
    "error": [
        *("row", "rate", "test error", "test loss", "training error", "training loss"),
        *("ζ > 1, %", "largest ‖v‖/s"),
    ],
    "loss": [
        *("row", "rate", "test loss", "test error", "training loss", "training error"),
        *("ms a step", "largest ‖v‖/s"),
    ],
}
_DIGITS = {"error": 2, "loss": 4}


def _content(found: Mapping[str, Any]) -> list[str]:
    """What the data were, by their checksums; nothing of results that are older than these."""
    if "data" not in found:
        return []
    if "classes" not in found["data"]:
        sizes = (
            f"{found['data'][split]['shape'][0]:,} bytes to {words} (checksum {found['data'][split]['crc32']:08x})"
            for split, words in (("train", "train on"), ("test", "test on"))
        )
        return [
            f"Data: {', '.join(sizes)}. All rows are tested on the same passages of the latter.",
            "",
        ]
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
    """The rows' training error (or loss, on text) over the epochs (steps), and that of each seed's test."""
    comparison, trainings = found["comparison"], asked(found)
    base = config_from_dict(comparison["base"])
    kind = kind_of(base)
    criterion = kind.criterion
    rows = [row for row in comparison["rows"] if _tests(trainings, row)]
    # A line of the legend, and one of the test errors, for every row.
    figure = Figure(figsize=(13, max(4.5, 1 + 0.25 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    epochs, tests = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        colour, style = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        errors = np.array([_numbers(t[f"train_{criterion}"]) for t in _tests(trainings, row)])
        epochs.plot(kind.places(base, errors.shape[1]), np.mean(errors, axis=0), style, color=colour, label=row)
        tested = np.array(_numbers(t[criterion] for t in _tests(trainings, row)))
        tests.plot(tested, np.full(len(tested), number), "o", color=colour, alpha=0.4)
        tests.plot([tested.mean()] * 2, [number - 0.4, number + 0.4], color=colour, linewidth=3)
    epochs.set(xlabel=kind.stretch, ylabel=kind.unit, title=f"Training {criterion}, mean over the seeds")
    if criterion == "error":
        _scale_of_errors(epochs)
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", fontsize="small")
    tests.set(xlabel=kind.unit, title=f"Test {criterion}: every seed, and the mean")
    tests.set_yticks(range(len(rows)), rows)
    tests.invert_yaxis()
    for axes in (epochs, tests):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _summary(trainings: list[Any], comparison: Mapping[str, Any], base: Config, row: str) -> list[str]:
    runs, criterion = _tests(trainings, row), kind_of(base).criterion
    last = {name: [run[f"train_{name}"][-1] for run in runs] for name in ("error", "loss")}
    figures = {
        name: (_spread([run[name] for run in runs], digits), _spread(last[name], digits))
        for name, digits in _DIGITS.items()
    }
    first, second = ("loss", "error") if criterion == "loss" else ("error", "loss")
    return [
        row,
        f"{row_rate(row, comparison, trainings):g}",
        figures[first][0],
        figures[second][0],
        figures[first][1],
        figures[second][1],
        f"{1000 * np.median([run['step_seconds'] for run in runs]):.0f}"
        if criterion == "loss"
        else _of_constrained(runs, "zeta_share", lambda shares: f"{100 * np.mean(shares):.1f}"),
        _of_constrained(runs, "step_ratio", lambda ratios: f"{max(ratios):.2g}"),
    ]


def _of_constrained(runs: list[Any], name: str, shown: Callable[[list[float]], str]) -> str:
    return "—" if runs[0].get(name) is None else shown([run[name] for run in runs])


def _against(trainings: list[Any], row: str, reference: str, criterion: str) -> list[str]:
    mine, others = ({t["seed"]: t[criterion] for t in _tests(trainings, name)} for name in (row, reference))
    seeds = sorted(mine.keys() & others.keys())
    x, y = (np.array(_numbers(figures[seed] for seed in seeds)) for figures in (mine, others))
    found, digits = paired_difference(x, y), _DIGITS[criterion]
    interval = "—" if math.isnan(found.lower) else f"{found.lower:+.{digits}f} to {found.upper:+.{digits}f}"
    p = "—" if math.isnan(found.p) else "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
    return [row, f"{found.mean:+.{digits}f}", interval, p]


def asked(found: Mapping[str, Any]) -> list[Any]:
    """The trainings without those that another command added: more seeds, or tests at the best rate of another grid."""
    comparison, trainings = found["comparison"], found["trainings"]
    rates = {row: row_rate(row, comparison, trainings) for row in comparison["rows"]}
    return [
        t
        for t in trainings
        if t["stage"] == "tuning" or (t["seed"] < comparison["seeds"] and t["lr"] == rates.get(t["row"]))
    ]


def _tests(trainings: list[Any], row: str) -> list[Any]:
    return [t for t in trainings if (t["row"], t["stage"]) == (row, "test")]


def _tuned(trainings: list[Any], row: str, lr: float, criterion: str) -> list[float]:
    return _numbers(t[criterion] for t in trainings if (t["row"], t["stage"], t["lr"]) == (row, "tuning", lr))


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else "—"


def _spread(values: Iterable[float | None], digits: int) -> str:
    numbers = _numbers(values)
    deviation = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}"


def _table(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
