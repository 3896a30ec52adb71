"""Draws docs/images/collections.svg: the same layer under PI, PO and PIO. Run it from anywhere, with no arguments."""

from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

import fgsgd_jax as fg

INPUTS, OUTPUTS = 6, 8
# Okabe and Ito's colours. Grey text on no background is legible on a light page and on a dark one.
COLOURS = {"Sphere": "#0072B2", "Oblique": "#E69F00", "Stiefel": "#009E73"}
GREY = "#808080"
TITLES = {
    "PI": "PI: each input channel's slices are\ndealt; a group: one colour of a row",
    "PO": "PO: each output channel's slices are\ndealt; a group: one colour of a column",
    "PIO": "PIO: half of the inputs by output,\nhalf-columns; the others as PI",
}


def main():
    matplotlib.rcParams.update(
        {"svg.hashsalt": "fgsgd_jax", "font.size": 11, "text.color": GREY, "axes.labelcolor": GREY}
    )
    figure = Figure(figsize=(10.5, 3.9), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    shape = jax.ShapeDtypeStruct((3, 3, INPUTS, OUTPUTS), np.float32)
    for axes, (name, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        manifolds = [fg.Sphere(), fg.Oblique(), fg.Stiefel()]
        collection = fg.plan({"kernel": shape}, [("kernel", getattr(fg, name)(manifolds))])["kernel"]
        draw(axes, collection)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{OUTPUTS} output channels")
        axes.set_ylabel(f"{INPUTS} input channels")
    legend = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, labelcolor=GREY)
    path = Path(__file__).parent / "images" / "collections.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw(axes, collection):
    # Half-columns first, so that PIO's two halves are two halves; elsewhere nothing moves.
    by_output = [np.unique(groups).size == OUTPUTS for groups in collection.group]
    rows = sorted(range(INPUTS), key=lambda row: not by_output[row]) if not all(by_output) else range(INPUTS)
    names = [type(manifold).__name__ for manifold in collection.manifolds]
    for y, row in enumerate(rows):
        for x in range(OUTPUTS):
            colour = COLOURS[names[collection.member[row, x]]]
            axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, facecolor=colour))
    halves = sum(by_output)
    for x in range(OUTPUTS + 1) if halves else ():
        axes.plot([x, x], [0, halves], color=GREY, linewidth=1.6)
    for y in {*range(halves, INPUTS + 1), 0}:
        axes.plot([0, OUTPUTS], [y, y], color=GREY, linewidth=1.6)
    axes.set(xlim=(-0.1, OUTPUTS + 0.1), ylim=(INPUTS + 0.1, -0.1), aspect="equal", xticks=[], yticks=[])
    axes.set_frame_on(False)


if __name__ == "__main__":
    main()
