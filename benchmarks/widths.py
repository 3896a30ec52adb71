"""Where the best learning rate lies, over widths: one rate relative to the radius serves all.

A network of three layers on scikit-learn's digits, trained for a few steps at every rate of a grid. Each layer has the
radius √(fan out / fan in), the first two times √2 for the ReLU behind them, so that features keep their scale at every
width. The optimum is that of a parabola through the losses at the best rate and its neighbours, in log rate.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fgsgd_jax as fg

RESULTS = Path(__file__).parent / "results" / "widths.json"
WIDTHS, STEPS, BATCH = (64, 128, 256, 512), 60, 256


def rules(manifold, width):
    """Layers on `manifold`, of the radii of the docstring; those of spheres are of Frobenius norms."""
    found = []
    for name, (fan_in, fan_out) in sizes(width).items():
        radius = math.sqrt((2 if name != "c" else 1) * fan_out / fan_in)
        rank = min(fan_in, fan_out) if manifold is fg.Sphere else 1
        found.append((name, fg.Whole(manifold(radius=radius * math.sqrt(rank)), view="i o -> 1 1 i o")))
    return [*found, ("*", None)]


def sizes(width):
    return {"a": (64, width), "b": (width, width), "c": (width, 10)}


# The optimizer of a rate and rules, the manifold, and the grid of rates.
ADAM_BESIDE = optax.adam(1e-2)
OPTIMIZERS = {
    "fg.spel": (lambda rate, rules: fg.spel(rate, rules, 0.9, free=ADAM_BESIDE), fg.Stiefel, -7),
    "fg.manifold_muon": (lambda rate, rules: fg.manifold_muon(rate, rules, 0.9, free=ADAM_BESIDE), fg.Stiefel, -7),
    "fg.hyperball(adam)": (lambda rate, rules: fg.hyperball(optax.adam(1e-2), rules, rate), fg.Sphere, -7),
    "optax.adam": (lambda rate, rules: optax.adam(rate), fg.Sphere, -10),
}
POINTS = 7


def losses(name, width, rates, seed=0):
    """The loss after training at every rate."""
    make, manifold, _ = OPTIMIZERS[name]
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
    labels = jnp.asarray(labels)
    own = rules(manifold, width)
    keys = jax.random.split(jax.random.key(seed))
    params = {name: jnp.zeros(shape) for name, shape in sizes(width).items()}
    params |= {f"{name}_bias": jnp.zeros(shape[1]) for name, shape in sizes(width).items()}
    params = fg.initialize(keys[0], params, own)
    picks = jax.random.randint(keys[1], (STEPS, BATCH), 0, len(images))

    def loss(params, images, labels):
        x = images
        for name in "abc":
            x = x @ params[name] + params[f"{name}_bias"]
            x = jax.nn.relu(x) if name != "c" else x
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    def trained(rate):
        tx = make(rate, own)

        def step(carry, pick):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, images[pick], labels[pick]), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), picks)
        return loss(end, images, labels)

    return np.asarray(jax.jit(jax.vmap(trained))(jnp.asarray(rates, jnp.float32)), float)


def optimum(rates, found):
    """The rate at the least of a parabola; the best of the grid at its ends."""
    best = int(np.nanargmin(found))
    if best in (0, len(rates) - 1):
        return float(rates[best])
    left, middle, right = found[best - 1 : best + 2]
    shift = (left - right) / (2 * (left - 2 * middle + right))
    return float(2 ** (np.log2(rates[best]) + shift * np.log2(rates[1] / rates[0])))


def optima_table(rows, names, widths, key):
    """The optima as Markdown: a line for each name, a column for each width."""
    lines = [["best rate at width", *map(str, widths), "largest / smallest"], ["---", *["---:"] * (len(widths) + 1)]]
    for name in names:
        by_width = {row["width"]: row["optimum"] for row in rows if row[key] == name}
        found = [by_width[width] for width in widths if width in by_width]
        lines.append([f"`{name}`", *(f"{rate:.3f}" for rate in found), f"{max(found) / min(found):.2f}"])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def rows_of(path, header):
    """The rows in `path`, if they were measured as a new one will be: a table has rows of one kind."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if other := [name for name, value in header.items() if kept.get(name) != value]:
        raise SystemExit(f"{path} has rows of other {' and '.join(other)}; give another --results")
    return kept["rows"]


def table(rows):
    """The optima, a line for each optimizer, as docs/directions.md shows them."""
    return optima_table(rows, OPTIMIZERS, WIDTHS, "optimizer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    header = {"steps": STEPS, "batch": BATCH}
    rows = rows_of(options.results, header)
    for name in options.only:
        lowest = OPTIMIZERS[name][2]
        rates = [2.0**power for power in range(lowest, lowest + POINTS)]
        for width in options.widths:
            start = time.perf_counter()
            found = losses(name, width, rates)
            row = {"optimizer": name, "width": width, "optimum": optimum(rates, found), "rates": rates}
            row["losses"] = [round(float(each), 5) for each in found]
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows = [old for old in rows if (old["optimizer"], old["width"]) != (name, width)] + [row]
            print(
                f"{name}, width {width}: optimum {row['optimum']:.4g}, losses {row['losses']}, {row['seconds']} s",
                flush=True,
            )
            options.results.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
