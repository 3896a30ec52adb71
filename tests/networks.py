"""A small network on mixed manifolds, its slices as the slow reference has them, and a training loop."""

from __future__ import annotations

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

import fgsgd_jax as fg

EVERY_KIND = [fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]
SHAPES = {
    "conv0/kernel": (3, 3, 1, 6),
    "conv0/bias": (6,),
    "conv1/kernel": (3, 3, 6, 8),
    "conv1/bias": (8,),
    "conv2/kernel": (5, 3, 8, 4),
    "conv2/bias": (4,),
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
}
RULES = [
    ("conv0/kernel", fg.PI([fg.Sphere(), fg.Oblique(), fg.Stiefel()])),
    ("conv1/kernel", fg.PIO(EVERY_KIND)),
    ("conv2/kernel", fg.PO([fg.Stiefel(retraction="qr"), fg.Stiefel(retraction="cayley"), fg.Sphere()])),
    ("dense/kernel", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")),
    ("*", None),
]
MIXED = [("kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])), ("*", None)]


SMALL_SHAPES = {"conv/kernel": (3, 3, 2, 6), "conv/bias": (6,), "dense/kernel": (4, 3), "dense/bias": (3,)}
SMALL_RULES = [
    ("conv/kernel", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel()])),
    ("dense/kernel", fg.Whole(fg.Stiefel())),
    ("*", None),
]


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def flat(tree):
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def gaussians(shapes, dtype, number=0, scale=0.3):
    rng = np.random.default_rng(number)
    return nested({path: jnp.asarray(scale * rng.standard_normal(s), dtype) for path, s in shapes.items()})


@functools.cache
def small_network(seed=0):
    """Of a kernel and a matrix, for what does not depend on how many there are; in float32."""
    params = gaussians(SMALL_SHAPES, "float32", seed)
    plan = fg.plan(params, SMALL_RULES, seed=seed)
    return fg.initialize(jax.random.key(seed), params, plan), plan


@functools.cache
def network(seed=0, dtype="float64", **options):
    params = gaussians(SHAPES, dtype, seed)
    plan = fg.plan(params, RULES, seed=seed, **options)
    return fg.initialize(jax.random.key(seed), params, plan), plan


@jax.jit
def slope_of_loss(params):
    """Gradient of a convolutional network's loss on fixed data: smooth, so that nearby weights have nearby ones."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((8, 6, 6, 1)))
    y = jnp.asarray(rng.standard_normal((8, 3)))

    def loss(params):
        z = x
        for layer in ("conv0", "conv1", "conv2"):
            kernel, bias = params[layer]["kernel"], params[layer]["bias"]
            # Without this the signal of Glorot's gamma fades, and every zeta with it.
            kernel = kernel / kernel.shape[2] ** -0.5 * 4
            z = jax.lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            z = jnp.tanh(z + bias.reshape(1, 1, 1, -1))
        z = z.mean((1, 2)) @ params["dense"]["kernel"] + params["dense"]["bias"].reshape(1, -1)
        return jnp.mean((z - y) ** 2)

    return jax.grad(loss)(params)


def falling(count):
    """A schedule in float64: Optax's own compute in float32, which the reference would have to imitate."""
    return lambda step: jnp.asarray(np.linspace(0.04, 0.004, count))[step]


def in_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def name_of(manifold):
    return type(manifold).__name__.lower(), getattr(manifold, "retraction", None)


def kernel_slices(collection):
    """Of the view `h w i o -> i o h w`, located independently of the library's."""
    return lambda shape: reference.slices(
        [name_of(m) for m in collection.manifolds],
        collection.member,
        collection.group,
        collection.gamma,
        lambda c, d: ((slice(None), slice(None), c, d), shape[:2]),
    )


def layers_of(params, plan):
    layers = {}
    for path, leaf in flat(params).items():
        collection = plan[path]
        if collection is None:
            continue
        if leaf.ndim == 4:
            layers[path] = kernel_slices(collection)(leaf.shape)
        else:
            layers[path] = reference.slices(
                [name_of(m) for m in collection.manifolds],
                collection.member,
                collection.group,
                collection.gamma,
                lambda c, d, shape=leaf.shape: ((slice(None), slice(None)), shape),
            )
    return layers


def worst_violation(params, layers):
    """By the definition, at the radius the plan gives: not at one read back from the weights."""
    worst = 0.0
    for path, members in layers.items():
        weight = np.asarray(flat(params)[path], np.float64)
        worst = max(worst, *(float(h.violation(s.kind, s.of(weight), s.radius)) for s in members))
    return worst


def run(tx, params, gradients, count):
    """`count` jitted steps; `gradients` is a function of the parameters."""
    state = tx.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(gradients(params), state, params)
    return params, state
