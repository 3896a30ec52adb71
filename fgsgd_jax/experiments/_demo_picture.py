import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ._paired import paired_difference
from ._picture import COLOURS, ERROR_TICKS

Trainings = Mapping[str, Sequence[Mapping[str, Any]]]

# Grey for what is on no manifold.
ROW_COLOURS = ("#666666", COLOURS[0])
MANIFOLD_COLOURS = {"Sphere": COLOURS[0], "Oblique": COLOURS[4], "Stiefel": COLOURS[2], "Euclidean": "#888888"}


def draw_demo(trainings: Trainings, weights: Mapping[str, Any], limits: str, path: Path) -> None:
    """Draw curves, every seed's test error and one layer's slices into one PNG file.

    Args:
        trainings: of the two rows, the baseline first, one record a seed.
        weights: `layer`, its `kernel` [height, width, inputs, outputs], the `member` of every slice and the manifolds'
            `names`.
        limits: the sentences on where all this does not help.
        path: the file.
    """
    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    left, right = halves
    curves, seeds = left.subplots(2, 1)
    _draw_curves(curves, trainings)
    _draw_seeds(seeds, trainings)
    _draw_slices(right.subplots(), weights)
    right.supxlabel("\n".join(textwrap.wrap(limits.replace("\n", " "), 100)), fontsize="small", x=0.02, ha="left")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_curves(axes: Axes, trainings: Trainings) -> None:
    for colour, (name, records) in zip(ROW_COLOURS, trainings.items(), strict=True):
        epochs = records[0]["epochs"]
        for key, style in (("train_error", ":"), ("test_error", "-")):
            values = np.array([record[key] for record in records], float)
            axes.plot(epochs, values.mean(axis=0), style, color=colour, label=name if key == "test_error" else None)
            if key == "test_error":
                axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(ERROR_TICKS)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 100)
    axes.set(title="Error over the training: mean, and the range of the seeds", xlabel="step", ylabel="%")
    styles = [Line2D([], [], color="black", linestyle=style) for style in ("-", ":")]
    handles, names = axes.get_legend_handles_labels()
    axes.legend([*handles, *styles], [*names, "test", "training"], loc="upper right", fontsize="small")
    axes.grid(alpha=0.3)


def _draw_seeds(axes: Axes, trainings: Trainings) -> None:
    (free_name, free), (name, constrained) = (
        (name, np.array([record["test_error"][-1] for record in records], float)) for name, records in trainings.items()
    )
    for one, other in zip(free, constrained, strict=True):
        axes.plot([one, other], [1, 0], color="#cccccc", linewidth=1, zorder=1)
    for place, colour, errors in ((1, ROW_COLOURS[0], free), (0, ROW_COLOURS[1], constrained)):
        axes.plot(errors, np.full(len(errors), place), "o", color=colour, alpha=0.6)
        axes.plot([errors.mean()] * 2, [place - 0.25, place + 0.25], color=colour, linewidth=3)
    found = paired_difference(constrained, free)
    axes.set_yticks([1, 0], [textwrap.fill(each, 18) for each in (free_name, name)])
    axes.set_ylim(-0.6, 1.6)
    axes.set(
        title=f"Test error of every seed: difference {found.mean:+.2f} points\n"
        f"(95 % interval {found.lower:+.2f} to {found.upper:+.2f}, {len(free)} seeds)",
        xlabel="%",
    )
    axes.grid(alpha=0.3, axis="x")


def _draw_slices(axes: Axes, weights: Mapping[str, Any]) -> None:
    axes.imshow(tiles(weights["kernel"], weights["member"], weights["names"]), interpolation="nearest")
    height, width, inputs, outputs = weights["kernel"].shape
    for ticks, labels, count, size in (
        (axes.set_xticks, "output channel", outputs, width),
        (axes.set_yticks, "input channel", inputs, height),
    ):
        shown = range(0, count, 5)
        ticks([1 + (size + 1) * place + (size - 1) / 2 for place in shown], [str(place) for place in shown])
        (axes.set_xlabel if labels.startswith("output") else axes.set_ylabel)(labels)
    axes.set_title(
        f"{weights['layer'].removesuffix('/kernel')}: {inputs}×{outputs} slices of {height}×{width} after training\n"
        "colour: the slice's manifold; light: positive entries, dark: negative ones"
    )
    patches = [Patch(color=MANIFOLD_COLOURS[name], label=name) for name in weights["names"]]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(patches), frameon=False)


def tiles(
    kernel: Float[np.ndarray, "height width inputs outputs"], member: Any, names: Sequence[str]
) -> Float[np.ndarray, "rows columns 3"]:
    """The slices side by side, inputs down and outputs across, each in its manifold's colour from dark to light."""
    height, width, inputs, outputs = kernel.shape
    picture = np.ones((1 + inputs * (height + 1), 1 + outputs * (width + 1), 3))
    for row in range(inputs):
        for column in range(outputs):
            entries = kernel[:, :, row, column]
            # Each slice by its own largest entry: their norms differ by manifold.
            light = 0.5 + 0.5 * entries / max(np.abs(entries).max(), np.finfo(kernel.dtype).tiny)
            colour = np.array(to_rgb(MANIFOLD_COLOURS[names[int(member[row, column])]]))
            dark, pale = 0.35 * colour, 1 - 0.25 * (1 - colour)
            top, left = 1 + row * (height + 1), 1 + column * (width + 1)
            picture[top : top + height, left : left + width] = dark + light[..., None] * (pale - dark)
    return picture
