from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from ._words import WORDS, Words

ERROR_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(runs: Mapping[str, Records], path: Path, words: Words = WORDS["images"]) -> None:
    """Draw the runs' loss, error, ζ and weights' norms over epochs into one PNG file.

    Args:
        runs: the epochs' log lines, by the name to show.
        path: the file.
        words: of the runs' task.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, error, zeta, norms = figure.subplots(2, 2).flat
    for colour, records in zip(_colours(len(runs)), runs.values(), strict=True):
        epochs = [record[words.lap] for record in records]
        for axes, name in ((loss, "loss"), (error, "error")):
            axes.plot(
                epochs,
                _series(records, "train", name),
                linestyle=":",
                markerfacecolor="white",
                **_style(colour, records),
            )
            axes.plot(epochs, _series(records, "test", name), **_style(colour, records))
        _draw_norms(norms, epochs, records, colour)
    _draw_zeta(zeta, runs, words)

    loss.set(title="Loss", ylabel="cross-entropy")
    error.set(title=words.error, ylabel="%")
    norms.set(title=words.norms, ylabel="Frobenius: median, range over layers")
    # Linear below 1 %, where an error of 0 has its place too.
    error.set_yscale("symlog", linthresh=1)
    least = min((line.get_ydata().min() for line in error.lines if line.get_ydata().size), default=0)
    error.set_ylim(max((tick for tick in ERROR_TICKS if tick < least), default=0), 100)
    error.set_yticks([tick for tick in ERROR_TICKS if tick >= error.get_ylim()[0]])
    error.yaxis.set_minor_locator(NullLocator())
    error.yaxis.set_major_formatter("{x:g}")
    _logarithmic(loss)
    _logarithmic(norms)
    last = max((record[words.lap] for records in runs.values() for record in records), default=1)
    dots = "o" if any(map(_few, runs.values())) else ""
    styles = [
        Line2D([], [], color="black", linestyle=":", marker=dots, markerfacecolor="white"),
        Line2D([], [], color="black", linestyle="-", marker=dots),
    ]
    for axes in (loss, error):
        axes.legend(styles, ["train", "test"], loc="upper right")
    for axes in (loss, error, zeta, norms):
        axes.set_xlabel(words.lap)
        axes.set_xlim(0, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in _colours(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    _save(figure, path)


def draw_scales(records: Records, path: Path) -> None:
    """Draw λ and ℜ of every layer over epochs into one PNG file, from light (first layer) to dark (last).

    Args:
        records: the epochs' log lines of a run with λ.
        path: the file.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = [name for name, values in records[0]["by_parameter"].items() if "lambda" in values] if records else []
    epochs = [record["epoch"] for record in records]
    titles = {"lambda": "λ: standard deviation of the features", "radius": "ℜ = γ/λ: radius of the weights"}
    colours = colormaps["viridis_r"]
    for axes, (figure_name, title) in zip(figure.subplots(1, 2).flat, titles.items(), strict=True):
        for place, name in enumerate(names):
            colour = colours(place / max(len(names) - 1, 1))
            values = _series(records, "by_parameter", name, figure_name)
            axes.plot(epochs, values, color=colour, marker="o" if _few(records) else "", linewidth=1)
        axes.set(title=title, xlabel="epoch, at its end", ylabel="median over a layer's slices")
        _logarithmic(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    layers = ScalarMappable(Normalize(1, max(len(names), 2)), colours)
    figure.colorbar(layers, ax=figure.axes, label="layer")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_norms(axes: Axes, epochs: Sequence[int], records: Records, colour: str) -> None:
    kernels = [
        [norm for name, norm in record["norms"].items() if name.endswith("kernel") and not name.startswith("head")]
        for record in records
    ]
    values = np.array(kernels, float)
    if values.size == 0:
        return
    axes.plot(epochs, np.median(values, axis=1), **_style(colour, records))
    smallest, largest = values.min(axis=1), values.max(axis=1)
    if _few(records):
        axes.vlines(epochs, smallest, largest, color=colour, alpha=0.3, linewidth=4)
    else:
        axes.fill_between(epochs, smallest, largest, color=colour, alpha=0.15, linewidth=0)


def _draw_zeta(axes: Axes, runs: Mapping[str, Records], words: Words) -> None:
    constrained = {
        colour: records
        for colour, records in zip(_colours(len(runs)), runs.values(), strict=True)
        if records and "zeta_share" in records[0]
    }
    axes.set(title="Normalization by ζ")
    if not constrained:
        axes.text(0.5, 0.5, "no weight is constrained", transform=axes.transAxes, ha="center", color="gray")
        axes.set_yticks([])
        return
    # An optimizer without line 6 has no ζ.
    normalizes = any(not np.isnan(_series(records, "zeta_share")).all() for records in constrained.values())
    if normalizes:
        axes.set(ylabel="groups with ζ > 1, % (solid)")
    else:
        axes.set(title="Longest step")
    ratio = axes.twinx() if normalizes else axes
    ratio.set(ylabel="largest ‖v‖/s (dashed)")
    _logarithmic(ratio)
    for colour, records in constrained.items():
        epochs = [record[words.lap] for record in records]
        if normalizes:
            axes.plot(epochs, 100 * _series(records, "zeta_share"), **_style(colour, records))
        style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"} | _style(colour, records)
        ratio.plot(epochs, _series(records, "step_ratio"), **style)
    if normalizes:
        axes.set_ylim(bottom=0)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale labelled at 1, 2 and 5 in plain figures."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _series(records: Records, *names: str) -> np.ndarray:
    """One figure of every line; what was not finite is a gap."""
    values = []
    for record in records:
        value: Any = record
        for name in names:
            value = value[name]
        values.append(np.nan if value is None else value)
    return np.array(values, float)


def _few(records: Records) -> bool:
    """Whether a line through the epochs would hardly be seen."""
    return len(records) <= 2


def _style(colour: str, records: Records) -> dict[str, Any]:
    return {"color": colour, "marker": "o" if _few(records) else ""}


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
