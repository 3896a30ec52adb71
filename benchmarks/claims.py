"""What λ does to the loss along a step, and how evenly the slices lie on their manifolds: two claims of the paper.

**The gradient along the step.** L is the loss on fixed training images (batch statistics, no augmentation) as a
function of the kernels that the schemes constrain, everything else held where it is; v is the step that these kernels
take in the training, momentum included. In the middle of every epoch,

    change = max over t of ‖∇L(x + t v) − ∇L(x)‖,  t = ½, 1.

Reported are `smoothness` = change/‖v‖, which has a unit: it is smaller wherever the weights are larger; `relative`,
change/‖∇L(x)‖; and `elasticity`, the relative change of the gradient over the relative change ‖v‖/‖x‖ of the weights,
which has none.

**Uniformity** (section 4.2). For slices u of unit norm, 9·mean ⟨u, u'⟩² over the pairs: 1 for uniform points on each of
the three manifolds of 3×3 matrices (the second moment is 1/9 of the identity on all), more where they crowd. Mean over
the layers; the sampling spread is that of uniform points in the same numbers. `spectral` is 9 times the largest
eigenvalue of the second moment, which is above 1 for few uniform points too. `kept` is the mean cosine of a slice with
itself before the training: slices that do not move stay as uniform as they began. The baseline's slices are divided by
their norms.

Prints what it finds and writes JSON and a picture.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from timing import machine

import fgsgd_jax as fg
from fgsgd_jax.experiments import TrainConfig, Trainer, build, load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = {
    "euc": {"scheme": "euc"},
    "pio3, λ off": {"scheme": "pio:sp+ob+st"},
    "pio3, λ first": {"scheme": "pio:sp+ob+st", "lambda_": "first"},
    "pio3, λ epoch": {"scheme": "pio:sp+ob+st", "lambda_": "epoch"},
}
COLORS = dict(zip(ROWS, ("#777777", "#d55e00", "#e69f00", "#0072b2"), strict=True))
KINDS = {"Sphere": "#009e73", "Oblique": "#cc79a7", "Stiefel": "#0072b2", "Euclidean": "#777777"}
ALONG = (0.5, 1.0)
UNIFORM_DRAWS = 400


class Probe:
    """The loss's gradient on fixed images, with respect to the constrained kernels."""

    def __init__(self, trainer: Trainer, paths: tuple[str, ...], images: int):
        data = trainer.data
        statistics = (data.train.images.mean((0, 1, 2)), data.train.images.std((0, 1, 2)))
        x = jnp.asarray((data.train.images[:images] - statistics[0]) / statistics[1], jnp.float32)
        y = jnp.asarray(data.train.labels[:images])
        model = build(trainer.config.model, len(data.classes), data.channels)

        def loss(params, stats):
            logits, *_ = model.apply(params, stats, x, True, False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def along(before, after, stats):
            def gradient(t):
                def moved(path, a, b):
                    return a + t * (b - a) if name_of(path) in paths else a

                at = jax.tree_util.tree_map_with_path(moved, before, after)
                return kernels(jax.grad(loss)(at, stats), paths)

            here = gradient(jnp.float32(0))
            changes = jnp.stack([length(difference(gradient(jnp.float32(t)), here)) for t in ALONG])
            a, b = kernels(before, paths), kernels(after, paths)
            step = length(difference(b, a))
            change = jnp.max(changes)
            relative = change / length(here)
            return {
                "smoothness": change / step,
                "relative": relative,
                "elasticity": relative / (step / length(a)),
                "gradient": length(here),
                "step": step,
                "weights": length(a),
            }

        self.along = jax.jit(along)


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def kernels(tree, paths):
    leaves = {name_of(path): x for path, x in jax.tree.leaves_with_path(tree)}
    return [leaves[path] for path in paths]


def difference(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def length(arrays):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in arrays))


def slices(tree, member):
    """By manifold and layer, the unit slices [n, 9] of a network's constrained kernels."""
    found = {}
    for path, kinds in member.items():
        (kernel,) = kernels(tree, [path])
        u = np.moveaxis(np.asarray(kernel, np.float64), (0, 1), (2, 3)).reshape(*kernel.shape[2:], -1)
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        for kind in np.unique(kinds):
            found.setdefault(str(kind), []).append(u[kinds == kind])
    return found


def uniformity(layers):
    """9·mean squared cosine of the pairs, and 9·largest eigenvalue of the second moment; means over the layers."""
    cosines, spectral = [], []
    for u in layers:
        n, moment = len(u), u.T @ u
        cosines.append(u.shape[1] * (np.sum(moment**2) - n) / (n * (n - 1)))
        spectral.append(u.shape[1] * np.linalg.eigvalsh(moment)[-1] / n)
    return {"cosines": float(np.mean(cosines)), "spectral": float(np.mean(spectral))}


def of_uniform_points(kind, counts):
    """The same of points drawn uniformly, in these numbers: mean, and the middle 95 %."""
    manifold = fg.Sphere() if kind == "Euclidean" else getattr(fg, kind)()
    drawn = jax.jit(lambda key: manifold.random_point(key, (sum(counts), 3, 3), jnp.float32))
    found = []
    for number in range(UNIFORM_DRAWS):
        u = np.asarray(drawn(jax.random.key(number)), np.float64).reshape(-1, 9)
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        found.append(uniformity(np.split(u, np.cumsum(counts)[:-1])))
    return {
        name: {"mean": float(np.mean(values)), "interval": np.quantile(values, (0.025, 0.975)).tolist()}
        for name in ("cosines", "spectral")
        for values in [[each[name] for each in found]]
    }


def train(trainer, probe, member, seed):
    """One training: the gradient along a step of every epoch, and the slices before and after every one."""
    plan, state = trainer.plan_of(seed), trainer.start(seed)
    first = slices(state.params, member)
    found = {"along": [], "uniformity": [], "train": []}

    def look(params):
        now = slices(params, member)
        found["uniformity"].append(
            {
                kind: uniformity(layers)
                | {"kept": float(np.mean(np.sum(np.concatenate(layers) * np.concatenate(first[kind]), axis=-1)))}
                for kind, layers in now.items()
            }
        )

    look(state.params)
    middle = trainer.steps_per_epoch // 2
    for _ in range(trainer.config.epochs):
        order = trainer.order(state)
        state = trainer.advance(state, order, middle)
        before, stats = jax.tree.map(jnp.copy, (state.params, state.stats))
        state = trainer.advance(state, order, 1)
        found["along"].append({name: float(x) for name, x in probe.along(before, state.params, stats).items()})
        state = trainer.advance(state, order, trainer.steps_per_epoch - middle - 1)
        look(state.params)
        found["train"].append(trainer.report_training(state, plan)["train"])
    return found


def rounded(value):
    """To five digits, which the seeds differ by more than."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def series(runs, part, *names):
    """[seeds, epochs] of one figure."""

    def value(record):
        for name in names:
            record = record[name]
        return record

    return np.array([[value(record) for record in run[part]] for run in runs], float)


def draw(figures, path):
    models = list(figures["models"])
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    for place, model in enumerate(models):
        of_model = axes[place]
        for row, runs in figures["models"][model].items():
            for panel, name in ((of_model[0], "smoothness"), (of_model[1], "elasticity")):
                values = series(runs, "along", name)
                epochs = np.arange(1, values.shape[1] + 1)
                panel.semilogy(epochs, np.median(values, axis=0), color=COLORS[row], label=row)
                panel.fill_between(epochs, values.min(0), values.max(0), color=COLORS[row], alpha=0.15, linewidth=0)
        of_model[0].set(ylabel="‖change of ∇L‖ / ‖step‖", title=f"{model}: median and range of the seeds")
        of_model[1].set(ylabel="relative change of ∇L / relative step", title=f"{model}: without the weights' unit")
        of_model[0].legend(fontsize="small")
        uniform = of_model[2]
        for row, style in (("euc", "-"), ("pio3, λ off", "-"), ("pio3, λ epoch", "--")):
            runs = figures["models"][model][row]
            for kind in runs[0]["uniformity"][0]:
                values = series(runs, "uniformity", kind, "cosines").mean(0)
                label = f"{kind} ({row})" if style == "-" else None
                uniform.plot(range(len(values)), values, style, color=KINDS[kind], label=label)
        widest = max((each["cosines"]["interval"] for each in figures["uniform"][model].values()), key=np.ptp)
        uniform.axhspan(*widest, color="black", alpha=0.12, linewidth=0, label="uniform points: widest 95 %")
        uniform.set(ylabel="9 · mean squared cosine", title=f"{model}: uniformity (dashed: λ epoch)")
        low, high = uniform.get_ylim()
        uniform.set_ylim(low, high + 0.4 * (high - low))
        uniform.legend(fontsize="small", loc="upper left")
        for panel in of_model:
            panel.set_xlabel("epoch")
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, default=("resnet8", "plain8"))
    parser.add_argument("--rates", type=float, nargs=2, default=(0.1, 0.1), help="of each model, for all rows")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--probe", type=int, default=128, help="images that the gradient is of")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/claims.json"))
    options = parser.parse_args()
    base = TrainConfig(limit_train=options.images, limit_test=100, epochs=options.epochs)
    data = load(base.data, limit_train=base.limit_train, limit_test=base.limit_test)
    figures = machine() | {name: value for name, value in vars(options).items() if name != "json"}
    figures |= {"schedule": base.schedule, "momentum": base.momentum, "models": {}, "uniform": {}}
    for model, rate in zip(options.models, options.rates, strict=True):
        found = figures["models"][model] = {}
        # The kernels that PIO constrains, of every row, and their manifolds by seed.
        plan_of = Trainer(dataclasses.replace(base, model=model), data).plan_of
        for row, changes in ROWS.items():
            trainer = Trainer(dataclasses.replace(base, model=model, lr=rate, **changes), data)
            probe = Probe(trainer, tuple(plan_of(0).collections), options.probe)
            found[row] = []
            for seed in range(options.seeds):
                member = {
                    path: np.array([type(kind).__name__ for kind in collection.manifolds])[collection.member]
                    for path, collection in plan_of(seed).collections.items()
                }
                if row == "euc":
                    member = {path: np.full(kinds.shape, "Euclidean") for path, kinds in member.items()}
                found[row].append(train(trainer, probe, member, seed))
                last = found[row][-1]
                print(
                    f"{model}, {row}, seed {seed}: loss {last['train'][-1]['loss']:.3g}, smoothness "
                    f"{last['along'][0]['smoothness']:.3g} … {last['along'][-1]['smoothness']:.3g}, elasticity "
                    f"{last['along'][0]['elasticity']:.3g} … {last['along'][-1]['elasticity']:.3g}, "
                    + ", ".join(f"{kind} {each['cosines']:.3f}" for kind, each in last["uniformity"][-1].items()),
                    flush=True,
                )
            counts = {
                str(kind): [int(np.sum(kinds == kind)) for kinds in member.values() if np.any(kinds == kind)]
                for kind in np.unique(np.concatenate([kinds.ravel() for kinds in member.values()]))
            }
            of_model = figures["uniform"].setdefault(model, {})
            of_model |= {kind: of_uniform_points(kind, counts[kind]) for kind in counts if kind not in of_model}
            options.json.write_text(json.dumps(rounded(figures), allow_nan=False) + "\n")
    draw(rounded(figures), options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
