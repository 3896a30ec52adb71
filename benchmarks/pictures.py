"""The picture of a folder of results: times against ours, updates against sgd, growth."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import FEASIBLE, FLOORS, Results, cases

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#999999", "#000000")


def draw(results: Results, path: Path) -> None:
    figure = Figure(figsize=(15, 11), layout="constrained")
    FigureCanvasAgg(figure)
    kernels, updates, layers, sizes = figure.subplots(2, 2).flat
    _kernels(kernels, results)
    _updates(updates, results)
    _growth(layers, results, ("layers", "slices"))
    _growth(sizes, results, ("size",))
    figure.savefig(path, dpi=110)


def _kernels(axes: Axes, results: Results) -> None:
    rows = results.rows("kernels")
    rows = [row for row in rows if row["name"] != "fgsgd_jax"]
    names, columns = list(dict.fromkeys(row["name"] for row in rows)), cases(rows)
    for index, name in enumerate(names):
        own = [row for row in rows if row["name"] == name]
        good = [name in FLOORS or row["violation"] <= FEASIBLE for row in own]
        axes.scatter(
            [row["over ours"] for row in own],
            [columns.index(row["case"]) for row in own],
            **_face(COLOURS[index % len(COLOURS)], name, good),
            marker="|" if name in FLOORS else "o",
            s=220 if name in FLOORS else 50,
            linewidths=2,
            label=name,
        )
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(xscale="log", xlabel="time / ours (hollow: not feasible)", title="Projection and retraction")
    axes.set_yticks(range(len(columns)), columns)
    axes.invert_yaxis()
    if names:
        axes.legend(fontsize=8)


def _face(colour: str, name: str, feasible: list[bool]) -> dict:
    """Filled, or hollow where not feasible; a bar has no face."""
    if name in FLOORS:
        return {"color": colour}
    return {"facecolors": [colour if each else "white" for each in feasible], "edgecolors": colour}


def _updates(axes: Axes, results: Results) -> None:
    rows = [row for row in results.rows("updates") if row["name"] != "optax.sgd"]
    labels = [f"{row['case']}: {row['name']}" for row in rows]
    colours = [COLOURS[0] if row["name"].startswith("fgsgd") else COLOURS[7] for row in rows]
    axes.barh(range(len(rows)), [row["over sgd"] for row in rows], color=colours)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(xscale="log", xlabel="time / optax.sgd with momentum", title="Whole updates")


def _growth(axes: Axes, results: Results, kinds: tuple[str, ...]) -> None:
    colour = iter(COLOURS)
    for kind in kinds:
        rows = results.rows("growth", axis=kind)
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            counts = [row["count"] for row in own]
            now = next(colour)
            axes.plot(counts, [row["median"] for row in own], "o-", color=now, label=f"{name}, {kind}")
            if kind == "layers":
                axes.plot(counts, [row["compile"] for row in own], "s:", color=now, label=f"{name}, compilation")
    axes.set(xscale="log", yscale="log", xlabel=" or ".join(kinds), ylabel="s")
    axes.set_title("Growth of the update" if len(kinds) > 1 else "Growth of a square Stiefel matrix's step")
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
