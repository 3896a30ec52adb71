"""Plain chains of convolutions, without shortcuts or normalization: what λ does to their features and their training.

FG-SGD (every slice on a Stiefel manifold, a group of its own) with λ off, with λ measured over the first epoch and
kept, and with λ measured over every epoch, beside momentum SGD from He's initialization. For every one the rate of the
grid with the least training loss counts. Prints what it finds and writes JSON and a picture: the features' deviation by
layer, and the loss over the epochs.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import fgsgd_jax as fg
from fgsgd_jax.experiments import load
from fgsgd_jax.features import batch_moments

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODES = {
    "lambda off": "FG-SGD, λ = 1",
    "lambda first": "FG-SGD, λ of the first epoch",
    "lambda epoch": "FG-SGD, λ of every epoch",
    "he": "SGD, He's initialization",
}
COLORS = dict(zip(MODES, ("#d55e00", "#0072b2", "#56b4e9", "#777777"), strict=True))
BATCH = 50
MOMENTUM = 0.9


class Chain:
    """`depth` convolutions and ReLUs of one width; the image shrinks at a third and at two thirds of the way."""

    def __init__(self, depth: int, width: int, channels: int, classes: int):
        self.names = [f"conv_{n:03d}" for n in range(depth)]
        self.strides = [2 if n in (depth // 3, 2 * depth // 3) else 1 for n in range(depth)]
        shapes = {name: (3, 3, width if n else channels, width) for n, name in enumerate(self.names)}
        self.zeros = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
        self.head = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}

    def __call__(self, params, x):
        """Scores, the moments of what enters every kernel, and the deviation of what leaves it."""
        moments, deviations = {}, []
        for name, stride in zip(self.names, self.strides, strict=True):
            moments[f"{name}/kernel"] = batch_moments(x, (-1,))
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, params[name]["kernel"], (stride, stride), "SAME", dimension_numbers=layout
            )
            x = jax.nn.relu(x)
            deviations.append(jnp.std(x))
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], moments, jnp.stack(deviations)

    def start(self, mode: str, key: jax.Array, steps_per_epoch: int):
        """The first weights, and the optimizer by its rate."""
        head = {
            **self.head,
            "kernel": jax.random.normal(key, self.head["kernel"].shape) / len(self.head["kernel"]) ** 0.5,
        }
        if mode == "he":
            draw = jax.nn.initializers.he_normal()
            keys = jax.random.split(key, len(self.names))
            kernels = {
                n: {"kernel": draw(k, self.zeros[n]["kernel"].shape)} for n, k in zip(self.names, keys, strict=True)
            }
            return kernels | {"head": head}, lambda rate: optax.with_extra_args_support(optax.sgd(rate, MOMENTUM))
        trace = fg.Trace(tuple((f"{name}/kernel", 1) for name in self.names))
        params = self.zeros | {"head": head}
        # Glorot's γ of the first layer, of one or three input channels, is so small a radius that a step of the rate
        # that suits the others turns its weights around.
        rules = [("conv_000/*", fg.Each(fg.Stiefel(radius=1.0))), ("conv_*", fg.Each(fg.Stiefel())), ("*", None)]
        plan = fg.plan(params, rules, trace=trace)
        # Features below 10⁻¹⁹ have no variance in float32: 50 layers need a few changes to have all of them measured.
        features = {
            "every": steps_per_epoch if mode == "lambda epoch" else None,
            "warmup": (steps_per_epoch // 4, steps_per_epoch) if mode == "lambda first" else None,
        }
        return fg.initialize(key, params, plan), lambda rate: fg.fgsgd(rate, plan, momentum=MOMENTUM, **features)


def train(chain, mode, data, rates, epochs):
    """By rate: the loss of every epoch, the training error, and the features' deviations at the start and the end."""
    images, labels = data
    steps = len(labels) // BATCH
    start, make = chain.start(mode, jax.random.key(0), steps)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y, rate):
        def objective(params):
            scores, moments, deviations = chain(params, x)
            loss = optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()
            return loss, (moments, deviations)

        (loss, (moments, deviations)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = make(rate).update(grads, state, params, feature_moments=moments)
        return optax.apply_updates(params, updates), state, loss, deviations

    wrong = jax.jit(lambda params, x, y: jnp.mean(chain(params, x)[0].argmax(-1) != y))
    found = []
    for rate in rates:
        began = time.perf_counter()
        params = jax.tree.map(jnp.copy, start)
        state = jax.tree.map(jnp.copy, make(rate).init(params))
        losses, profiles, count = [], [], 0
        for epoch in range(epochs):
            order, total = np.random.default_rng(epoch).permutation(len(labels)), []
            for rows in order[: steps * BATCH].reshape(steps, BATCH):
                now = rate * 0.5 * (1 + np.cos(np.pi * count / (steps * epochs)))
                params, state, loss, deviations = step(params, state, images[rows], labels[rows], jnp.float32(now))
                total.append(loss)
                count += 1
                if len(total) == 1 and epoch in (0, 1):
                    profiles.append(np.asarray(deviations, np.float64).tolist())
            losses.append(float(np.mean(total)))
        profiles.append(np.asarray(deviations, np.float64).tolist())
        error = 100 * float(
            np.mean(
                [wrong(params, images[n : n + BATCH], labels[n : n + BATCH]) for n in range(0, steps * BATCH, BATCH)]
            )
        )
        names = ("first step", "after an epoch", "last step")
        found.append(
            {"rate": rate, "loss": losses, "train_error": error, "deviations": dict(zip(names, profiles, strict=True))}
        )
        print(
            f"{mode:10} rate {rate:<6} loss {losses[0]:.3f} … {losses[-1]:.3f}, training error {error:.1f} %, "
            f"last layer {profiles[-1][-1]:.1e}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return found


def draw(found, path, title):
    """Deviations by layer and losses by epoch, at each mode's best rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for mode, runs in found.items():
        best = min(runs, key=lambda run: (np.isnan(run["loss"][-1]), run["loss"][-1]))
        for when, style in (("first step", ":"), ("after an epoch", "--"), ("last step", "-")):
            values = np.asarray(best["deviations"][when])
            label = MODES[mode] if when == "last step" else None
            left.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-30), style, color=COLORS[mode], label=label)
        right.plot(
            range(1, len(best["loss"]) + 1),
            best["loss"],
            color=COLORS[mode],
            label=f"{MODES[mode]}, rate {best['rate']}",
        )
    left.set(
        xlabel="layer",
        ylabel="standard deviation of the features",
        title="dotted: first step; dashed: second epoch; solid: last",
    )
    right.set(xlabel="epoch", ylabel="training loss", ylim=(0, 3), title=title)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=(0.01, 0.03))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path, help="where to write the figures; the picture goes beside it")
    options = parser.parse_args()
    data = load(options.data, limit_train=options.images, image_size=options.image_size)
    images = data.train.images.astype(np.float32)
    images = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    chain = Chain(options.depth, options.width, data.channels, len(data.classes))
    device = jax.devices()[0].device_kind
    print(f"{data.name}, depth {options.depth}, width {options.width}, {device}", flush=True)
    found = {
        mode: train(chain, mode, (images, data.train.labels), options.rates, options.epochs) for mode in options.modes
    }
    path = options.json or Path(f"benchmarks/results/depth_{Path(data.name).name}_{options.depth}.json")
    about = {
        "data": Path(data.name).name,
        "content": data.fingerprint(),
        "images": len(images),
        "size": images.shape[1],
        "depth": options.depth,
        "width": options.width,
    }
    path.write_text(json.dumps(about | {"device": device, "jax": jax.__version__, "found": found}, indent=1) + "\n")
    draw(found, path.with_suffix(".png"), f"{Path(data.name).name}, {options.depth} layers")


if __name__ == "__main__":
    main()
