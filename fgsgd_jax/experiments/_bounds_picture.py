from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._measures import FORMS, PAPERS, Measures, log10
from ._picture import COLOURS, _logarithmic

MARKERS = {"measured": "o", "bound": "_", "table2": "x"}
LABELS = {
    "measured": "measured",
    "bound": "valid bound on the manifolds",
    "table2": "Table 2 of the paper, of one slice",
}


def draw_bounds(measures: Measures, title: str, path: Path) -> None:
    """Draw groups' norms, operator norms and generalization bounds of one state into one PNG file."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    spectral, two_to_one, operators, bounds = figure.subplots(2, 2).flat
    _draw_groups(spectral, measures, "spectral", "Spectral norm of groups")
    _draw_groups(two_to_one, measures, "two_to_one", "2→1 norm of groups")
    _draw_operators(operators, measures)
    _draw_generalization(bounds, measures)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_groups(axes: Axes, measures: Measures, name: str, title: str) -> None:
    places = np.arange(1, len(measures.norms) + 1)
    for number, (kind, label) in enumerate(LABELS.items()):
        largest = np.array([largest_of(getattr(layer.groups, kind), name) for layer in measures.norms.values()])
        shown = np.isfinite(largest)
        if shown.any():
            style = {"linestyle": "none", "marker": MARKERS[kind], "markersize": 10 if kind == "bound" else 5}
            axes.plot(places[shown], largest[shown], label=label, color=COLOURS[number], **style)
    axes.axhline(1, color="gray", linewidth=1, linestyle="--", label="Proposition 1: ≤ 1")
    axes.set(title=title, ylabel="largest of a layer's groups")
    _layers(axes)
    axes.legend(fontsize="small")


def largest_of(norms, name: str) -> float:
    """The largest of the groups that have such a norm; NaN where none has."""
    values = np.atleast_1d(np.asarray(getattr(norms, name), float))
    values = values[~np.isnan(values)]
    return float(values.max()) if values.size else float("nan")


def _draw_operators(axes: Axes, measures: Measures) -> None:
    labels = {"reshaped": "reshaped kernel", "circular": "circular padding", "certified": "certified upper bound"}
    places = np.arange(1, len(measures.operators) + 1)
    for colour, (name, label) in zip(COLOURS, labels.items(), strict=False):
        values = [float(getattr(norms, name)) for norms in measures.operators.values()]
        axes.plot(places, values, marker=".", linewidth=1, color=colour, label=label)
    axes.set(title="Layers as operators, with batch normalization", ylabel="spectral norm")
    _layers(axes)
    axes.legend(fontsize="small")


def no_bound(measures: Measures) -> str | None:
    """Why the bounds of the papers are infinite, where they are."""
    papers = measures.bounds.papers
    if papers is None or not np.isposinf(papers).any():
        return None
    if measures.bounds.margin > 0:
        return "∞: a norm of the network is not finite"
    return f"∞: no bound, since the margin γ = {measures.bounds.margin:.3g} is not above 0"


def _layers(axes: Axes) -> None:
    _logarithmic(axes)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _draw_generalization(axes: Axes, measures: Measures) -> None:
    # Products over groups are of another order, and bounds of nothing: the table has them.
    forms = {form: label for form, label in FORMS.items() if form != "groups"}
    width, places = 0.8 / len(forms), np.arange(len(PAPERS))
    values = {
        form: np.array([log10(getattr(getattr(measures.bounds, form), paper)) for paper in PAPERS]) for form in forms
    }
    finite = [value for of_form in values.values() for value in of_form if np.isfinite(value)]
    top = 1.2 * max([1.0, *finite])
    for number, (form, label) in enumerate(forms.items()):
        endless = np.isposinf(values[form])
        # A bar up to the top, hatched, is no number; none at all is what the network does not have.
        shown = np.where(endless, top, np.where(np.isfinite(values[form]), values[form], 0))
        bars = axes.bar(
            places + (number - (len(forms) - 1) / 2) * width, shown, width, label=label, color=COLOURS[number]
        )
        for bar in (bar for bar, none in zip(bars, endless, strict=True) if none):
            bar.set(hatch="///", alpha=0.35)
        words = ["∞" if none else f"{value:.1f}" for none, value in zip(endless, values[form], strict=True)]
        axes.bar_label(bars, words, fontsize="small")
    if reason := no_bound(measures):
        axes.set_xlabel(reason)
    axes.axhline(0, color="gray", linewidth=1)
    # The legend stands above the bars.
    axes.margins(y=0.3)
    axes.set_xticks(places, PAPERS.values())
    axes.set(
        title=f"Generalization bounds; measured gap {measures.gap:.2f} %", ylabel="log₁₀; above 0 they say nothing"
    )
    axes.legend(fontsize="small", loc="upper center", ncols=len(forms))
