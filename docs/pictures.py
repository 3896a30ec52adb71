"""Draws the pictures of the pages into docs/images, from the committed results and from the library itself.

Run it from anywhere; names of pictures draw only these. A picture holds the figures that it was drawn from, which a
test compares with the results. Text and lines have the colour of the page's text: the site puts the files into the
page, and where they stand alone they are grey, legible on light and on dark. They are narrow, so that a telephone shows
them at a size that can be read.
"""

import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MultipleLocator

import fgsgd_jax as fg
from fgsgd_jax.experiments._demo_picture import tiles
from fgsgd_jax.experiments._paired import paired_difference

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

# Okabe and Ito's colours, told apart by everybody.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = {"Sphere": BLUE, "Oblique": YELLOW, "Stiefel": GREEN}
# Becomes the colour of the page's text.
GREY = "#808080"
WIDTH = 4.8

Figures = dict[str, Any]


class Picture(NamedTuple):
    """What a picture shows, and how it is drawn."""

    figures: Callable[[], Figures]
    draw: Callable[[Figure, Figures], None]
    height: float


def main(names: list[str]) -> None:
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.size": 10,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "legend.frameon": False,
        }
    )
    IMAGES.mkdir(exist_ok=True)
    for name in names or PICTURES:
        figures, draw, height = PICTURES[name]
        matplotlib.rcParams["svg.hashsalt"] = name
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        found = figures()
        draw(figure, found)
        path = IMAGES / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Description": json.dumps(found, ensure_ascii=False)})
        path.write_text(_plain(path.read_text(encoding="utf-8")), encoding="utf-8")


def _plain(svg: str) -> str:
    """With the page's colour in place of grey, and without the style that would reach beyond the picture."""
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace(GREY, "currentColor").replace(" version=", f' color="{GREY}" version=', 1)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def drawn_from(svg: str) -> Figures:
    """The figures that a picture holds."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else {}


# --- Comparisons ------------------------------------------------------------------------------------------------------


def _errors(folder: str, row: str) -> np.ndarray:
    """The test error of every seed."""
    found = json.loads((RESULTS / folder / "results.json").read_text(encoding="utf-8"))
    tests = [each for each in found["trainings"] if each["row"] == row and each["stage"] == "test"]
    return np.array([each["error"] for each in sorted(tests, key=lambda each: each["seed"])], float)


def _interval(errors: np.ndarray, reference: np.ndarray | float = 0.0) -> list[float]:
    """Mean and interval of what the errors have above the reference."""
    found = paired_difference(errors, np.broadcast_to(reference, errors.shape))
    return [round(value, 3) for value in found[:3]]


SETTINGS = {
    "250 digits": "compare_digits_250",
    "500 digits": "compare_digits_500",
    "1,000 digits": "compare_digits_ablations",
    "2,000 of CIFAR-10": "compare_cifar10_2000",
    "5,000 of CIFAR-10,\nshort, augmented": "compare_cifar10_5000",
}
DECAYS = ("", "~wd=0.005", "~wd=0.02")


def helps_figures() -> Figures:
    """Differences to free weights; each at the decay with the least mean error of those that were tried."""

    def best(folder: str, row: str) -> np.ndarray:
        tried = [errors for decay in DECAYS if len(errors := _errors(folder, row + decay))]
        return min(tried, key=np.mean)

    return {
        setting: {row: _interval(best(folder, row), best(folder, "euc")) for row in ("each-sp", "pio3")}
        for setting, folder in SETTINGS.items()
    }


def draw_helps(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    for place, rows in enumerate(found.values()):
        for row, colour, shift in (("each-sp", BLUE, -0.14), ("pio3", ORANGE, 0.14)):
            _dot(axes, rows[row], place + shift, colour)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.8)
    axes.text(-0.15, -0.55, "← better", ha="right")
    axes.text(0.15, -0.55, "worse →")
    axes.set_xlabel("test error minus that of free weights, points")
    _legend(figure, {"a sphere for each slice": BLUE, "mixed (PIO)": ORANGE})


def _dot(axes: Axes, interval: list[float], place: float, colour: str) -> None:
    mean, lower, upper = interval
    axes.plot([lower, upper], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([mean], [place], "o", color=colour, markersize=6)


def _legend(figure: Figure, names: dict[str, str]) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(names) < 4 else 3)


ROWS = {
    "euc": "free weights",
    "sp": "spheres by layers",
    "st": "Stiefel by layers",
    "each-sp": "spheres by slice",
    "pio3": "mixed (PIO)",
    "pio4": "mixed, free too",
}


def _row_figures(folder: str) -> Callable[[], Figures]:
    def figures() -> Figures:
        found = {
            name: {decay: _interval(errors) for decay in DECAYS[:2] if len(errors := _errors(folder, row + decay))}
            for row, name in ROWS.items()
        }
        return {name: intervals for name, intervals in found.items() if intervals}

    return figures


def draw_rows(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    colours = dict(zip(DECAYS, (BLUE, ORANGE), strict=False))
    for place, intervals in enumerate(found.values()):
        for decay, interval in intervals.items():
            shift = (-0.14 if decay == "" else 0.14) if len(intervals) > 1 else 0
            _dot(axes, interval, place + shift, colours[decay])
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="x", color=GREY, alpha=0.25)
    axes.set_xlabel("test error, %")
    _legend(figure, {"weight decay 0.0005": BLUE, "0.005": ORANGE})


def sizes_figures() -> Figures:
    folders = {250: "compare_digits_250", 500: "compare_digits_500", 1000: "compare_digits_ablations"}
    return {
        ROWS[row]: {
            str(size): _interval(_errors(folder, row), _errors(folder, "euc")) for size, folder in folders.items()
        }
        for row in ("each-sp", "pio3", "st")
    }


def draw_sizes(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    colours = dict(zip(found, (BLUE, ORANGE, GREEN), strict=True))
    for shift, (name, sizes) in zip((-0.2, 0, 0.2), found.items(), strict=True):
        for place, interval in enumerate(sizes.values()):
            _dot(axes, interval, place + shift, colours[name])
    axes.axvline(0, color=GREY, linewidth=1)
    sizes = next(iter(found.values()))
    axes.set_yticks(range(len(sizes)), [f"{int(size):,} images" for size in sizes])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.set_xlabel("test error minus that of free weights, points")
    _legend(figure, colours)


def widths_figures() -> Figures:
    """The losses by rate, and the best rate, of each optimizer and width."""
    found: Figures = {}
    for row in json.loads((RESULTS / "widths.json").read_text(encoding="utf-8"))["rows"]:
        own = {key: row[key] for key in ("rates", "losses", "optimum")}
        found.setdefault(row["optimizer"], {})[str(row["width"])] = own
    return found


def draw_widths(figure: Figure, found: Figures) -> None:
    panels = figure.subplots(2, 2, sharex=True).ravel()
    colours = dict(zip(found["fg.spel"], (BLUE, SKY, YELLOW, ORANGE), strict=True))
    for axes, (name, widths) in zip(panels, found.items(), strict=True):
        for width, own in widths.items():
            axes.plot(own["rates"], own["losses"], color=colours[width], linewidth=1)
            axes.axvline(own["optimum"], color=colours[width], linewidth=1, linestyle="dotted")
        axes.set(title=name, xscale="log", yscale="log", yticks=[])
        axes.minorticks_off()
    for axes in panels[2:]:
        axes.set_xlabel("learning rate")
    figure.supylabel("loss", fontsize=10)
    _legend(figure, {f"width {width}": colour for width, colour in colours.items()})


# --- Benchmarks -------------------------------------------------------------------------------------------------------


def _benchmark(part: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / "cpu" / f"{part}.json").read_text(encoding="utf-8"))["rows"]


def peers_figures() -> Figures:
    """The fastest other library that stays on the manifold, as a multiple of our time."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    cold = tables.Results(RESULTS / "cpu")
    warm, found = cold.repeated, {}
    for case in tables.cases(cold.rows("kernels")):
        fastest = {"cold": cold.fastest(case), "warm": warm.fastest(case)}
        found[case] = {cache: [row["name"], round(row["over ours"], 2)] for cache, row in fastest.items() if row}
    return found


def draw_peers(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    for place, caches in enumerate(found.values()):
        for cache, colour, shift in (("cold", BLUE, -0.19), ("warm", SKY, 0.19)):
            if cache in caches:
                name, ratio = caches[cache]
                axes.barh(place + shift, ratio, 0.34, color=colour)
                axes.text(ratio + 0.1, place + shift, f"{ratio:.2g} × {name}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(ratio for caches in found.values() for _, ratio in caches.values()))
    axes.set_xlabel("time of the fastest other library / ours")
    _legend(figure, {"cold cache": BLUE, "warm cache": SKY})


UPDATES = {"optax.sgd": "#999999", "optax.adamw": SKY, "optax.contrib.muon": YELLOW}


def updates_figures() -> Figures:
    found: Figures = {}
    for row in _benchmark("updates"):
        if row["name"].startswith("fgsgd") or row["name"] in UPDATES:
            found.setdefault(row["case"], {})[row["name"]] = round(row["over sgd"], 2)
    return found


def draw_updates(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    place, ticks = 0.0, {}
    for case, names in found.items():
        for name in sorted(names, key=names.__getitem__):
            axes.barh(place, names[name], 0.8, color=UPDATES.get(name, BLUE))
            axes.text(names[name] * 1.08, place, f"{names[name]:.2g}", va="center", fontsize=8)
            ours = name.removeprefix("fgsgd, ")
            ticks[place] = f"{case}: {ours}" if name.startswith("fgsgd") else name.removeprefix("optax.")
            place += 1
        place += 0.6
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylim(place - 1, -0.6)
    axes.set(xscale="log", xlim=(0.7, 1.6 * max(max(names.values()) for names in found.values())))
    axes.set_xlabel("time of the update, optax.sgd = 1")
    axes.xaxis.set_major_formatter("{x:g}")


def share_figures() -> Figures:
    """The share of a whole training step, in percent."""
    steps = [row for row in _benchmark("steps") if row["name"] == "update alone"]
    return {row["case"]: round(100 * row["of a step"], 2) for row in steps}


def draw_share(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    for place, share in enumerate(found.values()):
        axes.barh(place, share, 0.6, color=ORANGE)
        axes.barh(place, 100 - share, 0.6, left=share, color=SKY)
        axes.text(share + 1.5, place, f"{share:g} %", va="center", color="#000000")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of a training step")
    _legend(figure, {"update on manifolds": ORANGE, "forward and backward pass": SKY})


# --- Concepts ---------------------------------------------------------------------------------------------------------


def collections_figures() -> Figures:
    shape = jax.ShapeDtypeStruct((3, 3, 6, 8), np.float32)
    found = {}
    for name in ("PI", "PO", "PIO"):
        manifolds = [fg.Sphere(), fg.Oblique(), fg.Stiefel()]
        collection = fg.plan({"kernel": shape}, [("kernel", getattr(fg, name)(manifolds))])["kernel"]
        found[name] = {
            "names": [type(manifold).__name__ for manifold in collection.manifolds],
            "member": collection.member.tolist(),
            "group": collection.group.tolist(),
        }
    return found


def draw_collections(figure: Figure, found: Figures) -> None:
    for axes, (name, collection) in zip(figure.subplots(1, 3), found.items(), strict=True):
        _draw_collection(axes, collection)
        axes.set(title=name, xlabel="8 outputs", ylabel="6 inputs" if name == "PI" else "")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _draw_collection(axes: Axes, collection: Figures) -> None:
    member, group = np.array(collection["member"]), collection["group"]
    inputs, outputs = member.shape
    # Half-columns first, so that PIO's two halves are two halves; elsewhere nothing moves.
    by_output = [np.unique(groups).size == outputs for groups in group]
    rows = sorted(range(inputs), key=lambda row: not by_output[row]) if not all(by_output) else range(inputs)
    for y, row in enumerate(rows):
        for x in range(outputs):
            colour = COLOURS[collection["names"][member[row, x]]]
            axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, facecolor=colour))
    halves = sum(by_output)
    for x in range(outputs + 1) if halves else ():
        axes.plot([x, x], [0, halves], color=GREY, linewidth=1.6)
    for y in {*range(halves, inputs + 1), 0}:
        axes.plot([0, outputs], [y, y], color=GREY, linewidth=1.6)
    axes.set(xlim=(-0.1, outputs + 0.1), ylim=(inputs + 0.1, -0.1), aspect="equal", xticks=[], yticks=[])
    axes.set_frame_on(False)


def slices_figures() -> Figures:
    """The entries of a layer's slices as `fg.initialize` draws them under PIO."""
    start = {"kernel": jnp.zeros((3, 3, 8, 12), "float32")}
    rules = [("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()]))]
    plan = fg.plan(start, rules)
    kernel = np.asarray(fg.initialize(jax.random.key(0), start, plan)["kernel"], np.float64)
    collection = plan["kernel"]
    return {
        "names": [type(manifold).__name__ for manifold in collection.manifolds],
        "member": collection.member.tolist(),
        "kernel": kernel.round(2).tolist(),
    }


def draw_slices(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    pixels = tiles(np.array(found["kernel"]), np.array(found["member"]), found["names"])
    gaps = (pixels == 1).all(axis=-1, keepdims=True)
    pixels = np.concatenate([pixels, 1.0 - gaps], axis=-1)
    # Enlarged here: browsers blur what they enlarge.
    axes.imshow(pixels.repeat(12, axis=0).repeat(12, axis=1), interpolation="none")
    axes.set(xticks=[], yticks=[], xlabel="12 outputs", ylabel="8 inputs")
    axes.set_frame_on(False)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


MANIFOLDS = {
    "free": fg.Euclidean(),
    "Sphere: total length 1": fg.Sphere(),
    "Oblique: each column 1": fg.Oblique(),
    "Stiefel: and orthogonal": fg.Stiefel(),
}


def manifolds_figures() -> Figures:
    """The columns of the nearest points to one matrix."""
    matrix = jnp.array([[0.95, 0.65], [0.1, 0.35]])
    return {name: np.asarray(each.nearest(matrix), np.float64).round(3).tolist() for name, each in MANIFOLDS.items()}


def draw_manifolds(figure: Figure, found: Figures) -> None:
    for axes, (name, matrix) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        angles = np.linspace(0, 2 * np.pi, 100)
        axes.plot(np.cos(angles), np.sin(angles), color=GREY, linewidth=0.8, alpha=0.7)
        for column, colour in zip(np.array(matrix).T, (BLUE, ORANGE), strict=True):
            axes.annotate("", column, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
        axes.plot([0], [0], "o", color=GREY, markersize=3)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[], title=name)
        axes.set_frame_on(False)


LENGTHS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
RETRACTIONS = ("polar", "qr", "cayley")


def retractions_figures() -> Figures:
    """How far each retraction's point lies from the geodesic's, on St(5, 3), by the length of the step."""
    with jax.enable_x64(True):
        geodesic = fg.Stiefel()
        x = geodesic.nearest(jnp.eye(5, 3, dtype="float64"))
        v = geodesic.project(x, jnp.cos(jnp.arange(15.0, dtype="float64")).reshape(5, 3))
        x, v = (jnp.broadcast_to(each, (len(LENGTHS), 5, 3)) for each in (x, v / jnp.linalg.norm(v)))
        steps = jnp.array(LENGTHS)[:, None, None] * v
        ends = {name: np.asarray(fg.Stiefel(retraction=name).retract(x, steps)) for name in ("exp", *RETRACTIONS)}
    found = {name: np.linalg.norm(ends[name] - ends["exp"], axis=(1, 2)) for name in RETRACTIONS}
    # Three digits: what other hardware rounds in another way does not change them.
    return {name: [float(f"{gap:.2e}") for gap in gaps] for name, gaps in found.items()}


def draw_retractions(figure: Figure, found: Figures) -> None:
    axes = figure.subplots()
    for gaps, colour, marker in zip(found.values(), (BLUE, ORANGE, GREEN), "os^", strict=True):
        axes.plot(LENGTHS, gaps, f"{marker}-", color=colour, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="length of the step, in radii", ylabel="distance from the geodesic")
    axes.grid(color=GREY, alpha=0.25)
    _legend(figure, dict(zip(found, (BLUE, ORANGE, GREEN), strict=True)))


VIEWS = {
    "matrix": ("matrix", (6, 8)),
    "neurons": ("neurons", (6, 8)),
    "rows": ("rows", (6, 8)),
    "tiles": ("(i a) (o b) -> i o a b", (6, 8), {"a": 2, "b": 2}),
    "heads": ("e h d -> 1 h e d", (6, 2, 4)),
    "heads, of the output layer": ("h d e -> h 1 d e", (2, 3, 8)),
}
KERNEL_VIEWS = {"slices": ("slices", (2, 2, 3, 4)), "filters": ("filters", (2, 2, 3, 4))}


def views_figures() -> Figures:
    """For every entry the number of the matrix that it is in."""

    def numbers(pattern: str, shape: tuple[int, ...], sizes: dict[str, int] | None = None) -> Any:
        view = fg.View.of(pattern, shape, **(sizes or {}))
        inputs, outputs, rows, columns = view.grid
        grid = np.arange(inputs * outputs).reshape(inputs, outputs, 1, 1)
        grid = np.broadcast_to(grid, (inputs, outputs, rows, columns)).astype(np.float32)
        return np.asarray(view.merge(jnp.asarray(grid))).astype(int)

    found = {name: numbers(*view).reshape(6, 8).tolist() for name, view in VIEWS.items()}
    for name, view in KERNEL_VIEWS.items():
        # Windows side by side: inputs down, outputs across.
        found[f"{name}, of a convolution"] = numbers(*view).transpose(2, 0, 3, 1).reshape(6, 8).tolist()
    return found


def draw_views(figure: Figure, found: Figures) -> None:
    palette = (BLUE, YELLOW, GREEN, PURPLE, SKY, ORANGE)
    for axes, (name, numbers) in zip(figure.subplots(4, 2).flat, found.items(), strict=True):
        numbers = np.array(numbers)
        across = len(np.unique(numbers[0]))
        for number in np.unique(numbers):
            down, right = np.nonzero(numbers == number)
            (top, left), (bottom, end) = (down.min(), right.min()), (down.max() + 1, right.max() + 1)
            # A step to the side for each row of matrices, so that neighbours differ.
            colour = palette[(number + number // across) % len(palette)]
            size = end - left - 0.12, bottom - top - 0.12
            axes.add_patch(Rectangle((left + 0.06, top + 0.06), *size, facecolor=colour))
            entries = {"color": "white", "linewidth": 0.6, "alpha": 0.5}
            axes.vlines(range(left + 1, end), top + 0.06, bottom - 0.06, **entries)
            axes.hlines(range(top + 1, bottom), left + 0.06, end - 0.06, **entries)
        axes.set(xlim=(0, 8), ylim=(6, 0), aspect="equal", xticks=[], yticks=[], title=name)
        axes.set_frame_on(False)


PICTURES = {
    "collections": Picture(collections_figures, draw_collections, 2.1),
    "slices": Picture(slices_figures, draw_slices, 3.6),
    "manifolds": Picture(manifolds_figures, draw_manifolds, 4.6),
    "retractions": Picture(retractions_figures, draw_retractions, 3.2),
    "views": Picture(views_figures, draw_views, 6.4),
    "helps": Picture(helps_figures, draw_helps, 3.6),
    "findings_digits": Picture(_row_figures("compare_digits_ablations"), draw_rows, 3.0),
    "findings_sizes": Picture(sizes_figures, draw_sizes, 3.0),
    "findings_cifar10_2000": Picture(_row_figures("compare_cifar10_2000"), draw_rows, 3.0),
    "findings_cifar10_5000": Picture(_row_figures("compare_cifar10_5000"), draw_rows, 3.0),
    "widths": Picture(widths_figures, draw_widths, 4.2),
    "peers": Picture(peers_figures, draw_peers, 4.6),
    "updates": Picture(updates_figures, draw_updates, 5.0),
    "share": Picture(share_figures, draw_share, 1.8),
}


if __name__ == "__main__":
    main(sys.argv[1:])
