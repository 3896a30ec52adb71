"""The links and fgsgd: beside a slow reference, against the equations, and under the wrappers of optax and flax."""

import re
from typing import Any

import chex
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from chains import chained

import fgsgd_jax as fg

# --- a small mixed network

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


# --- beside the reference


@pytest.mark.parametrize(
    ("dtype", "limit", "options"),
    [
        pytest.param("float64", 1e-9, {}, marks=pytest.mark.slow),
        ("float64", 1e-9, {"momentum": 0.9}),
        pytest.param("float64", 1e-9, {"momentum": 0.9, "nesterov": True}, marks=pytest.mark.slow),
        pytest.param("float64", 1e-9, {"momentum": 0.5, "rho": 0.3, "curvature": 50.0}, marks=pytest.mark.slow),
        pytest.param("float32", 1e-5, {}, marks=pytest.mark.slow),
        ("float32", 1e-5, {"momentum": 0.9}),
    ],
    ids=str,
)
def test_fifty_steps_beside_the_reference(dtype, limit, options):
    params, plan = network(dtype=dtype)
    assert worst_violation(params, layers_of(params, plan)) <= 1e-6
    rates = falling(50)
    slow = dict(options)
    if "curvature" in slow:
        slow["c"] = slow.pop("curvature")
    theirs = reference.FineGrainedSGD(flat(params), layers_of(params, plan), **slow)

    tx = fg.fgsgd(rates, plan, **options)
    state, step = tx.init(params), jax.jit(tx.update)
    above = set()
    for t in range(50):
        gradients = slope_of_loss(in_dtype(params, "float64"))
        updates, state = step(in_dtype(gradients, dtype), state, params)
        params = optax.apply_updates(params, updates)

        mine = slope_of_loss(nested({path: jnp.asarray(w) for path, w in theirs.weights.items()}))
        theirs.step(flat(mine), float(rates(t)))
        above |= {z > 1 for z in theirs.zetas.values()}

    assert above == {True, False}  # both branches of the maximum in eq. 7 were taken
    for path, weight in flat(params).items():
        assert weight.dtype == dtype
        np.testing.assert_allclose(weight, theirs.weights[path], rtol=0, atol=limit, err_msg=path)
    # The weights went somewhere: agreement about standing still would prove nothing.
    start = flat(network(dtype=dtype)[0])
    for path, weight in flat(params).items():
        assert np.max(np.abs(weight - start[path])) > 1e-3, path


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({}, {"momentum": 0.9, "nesterov": True}, {"rho": 0.3, "curvature": 50.0})
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float64", 1e-12), pytest.param("float32", 3e-6, marks=pytest.mark.slow)]
)
def test_chain_is_fgsgd(options, dtype, limit):
    params, plan = network(dtype=dtype)
    rates = falling(20)

    def gradients(params):
        return in_dtype(slope_of_loss(in_dtype(params, "float64")), dtype)

    one, _ = run(fg.fgsgd(rates, plan, **options), params, gradients, 20)
    other, _ = run(chained(plan, rates, **options), params, gradients, 20)
    chex.assert_trees_all_close(one, other, rtol=0, atol=limit)
    assert worst_violation(other, layers_of(params, plan)) <= 1e-6


VIEWS = {
    "filters": ("h w i o -> 1 o (h w i) 1", {}, (3, 3, 4, 5)),
    "whole": ("h w i o -> 1 1 (h w i) o", {}, (3, 3, 4, 5)),
    "heads": ("e h d -> 1 h e d", {}, (8, 2, 4)),
    "tiles": ("(i a) (o b) -> i o a b", {"a": 4, "b": 2}, (8, 6)),
}


def locate_in(name):
    everything = slice(None)
    return {
        "filters": lambda c, d: ((everything, everything, everything, d), (36, 1)),
        "whole": lambda c, d: ((everything,) * 4, (36, 5)),
        "heads": lambda c, d: ((everything, d, everything), (8, 4)),
        "tiles": lambda c, d: ((slice(4 * c, 4 * c + 4), slice(2 * d, 2 * d + 2)), (4, 2)),
    }[name]


@pytest.mark.parametrize(
    "name", [name if name == "tiles" else pytest.param(name, marks=pytest.mark.slow) for name in VIEWS]
)
def test_other_views_beside_the_reference(name):
    """A tensor's matrices are where the pattern says, and the radius is the number asked for."""
    view, sizes, shape = VIEWS[name]
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape))}
    plan = fg.plan(params, [("w", fg.Each(fg.Stiefel(), view=view, **sizes))], gamma=0.7)
    params = fg.initialize(jax.random.key(0), params, plan)
    collection = plan["w"]
    members = reference.slices([("stiefel", "polar")], collection.member, collection.group, 0.7, locate_in(name))
    layers = {"w": members}
    assert worst_violation(params, layers) < 1e-12
    theirs = reference.FineGrainedSGD(params, layers, momentum=0.9)
    target = jnp.asarray(np.random.default_rng(1).standard_normal(shape))
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(10):
        theirs.step({"w": theirs.weights["w"] - np.asarray(target)}, 0.1)
        updates, state = step({"w": params["w"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], theirs.weights["w"], rtol=0, atol=1e-10)


# --- zeta

AT_ONE = 2**0.5 - 1


def tangents_of_length(lengths, dtype, s=0.3, shape=(3, 3)):
    """A tensor of one slice per column, its points, and tangent gradients of the given norms."""
    rng = np.random.default_rng(0)
    x = h.point("sphere", rng, (len(lengths), *shape), s)
    g = h.tangent("sphere", rng, x, s, length=1.0) * np.asarray(lengths)[:, None, None]
    as_kernel = [jnp.asarray(np.moveaxis(a, 0, -1)[:, :, None, :], dtype) for a in (x, g)]
    return {"k": as_kernel[0]}, {"k": as_kernel[1]}


@pytest.mark.parametrize(("rho", "c"), [(1.0, 0.0), (0.1, 0.0), (1.0, 100.0), (0.01, 3.0)])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_zeta_is_eq_5_and_eq_7(rho, c, dtype):
    """By the ratio of what goes into the link and what comes out, for norms from nothing to overflow."""
    lengths = np.array([0, 1e-20, 0.1, AT_ONE - 1e-4, AT_ONE + 1e-4, 1.0, 30.0, 1e6, 1e25])
    params, grads = tangents_of_length(lengths, dtype)
    plan = fg.plan(params, [("k", fg.Each(fg.Sphere(radius=0.3)))])
    link = fg.normalize_by_zeta(plan, rho=rho, curvature=c)
    updates, _ = link.update(grads, link.init(params), params)
    assert np.all(np.isfinite(updates["k"]))
    found = np.sqrt(np.sum(np.asarray(updates["k"], np.float64) ** 2, axis=(0, 1, 2)))
    expected = lengths / [reference.zeta(r, rho, c) for r in lengths]
    # In float32 nothing is left of a step of 1e-25.
    rtol, atol = (1e-6, 1e-24) if dtype == "float32" else (1e-12, 0)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    if (rho, c) == (1.0, 0.0):
        # zeta = 1, that is, nothing changes, iff R <= sqrt(2) - 1; above it the step is 1/(2 + R).
        changed = np.any(np.asarray(updates["k"]) != np.asarray(grads["k"]), axis=(0, 1, 2))
        np.testing.assert_array_equal(changed, lengths > AT_ONE)
        np.testing.assert_allclose(found[changed], 1 / (2 + lengths[changed]), rtol=1e-6, atol=atol)
        assert np.max(found) < 0.41422


def test_zeta_is_of_the_group_and_of_the_tangential_part():
    """R is the norm over all of a group's slices (eq. 6), and the normal component has no part in it."""
    params = {"k": jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 2, 3)))}
    member = np.zeros((2, 3), int)
    group = np.array([[0, 0, 1], [0, 1, 2]])
    plan = fg.plan(params, [("k", fg.Custom([fg.Sphere(radius=0.5)], member, group))])
    params = fg.initialize(jax.random.key(0), params, plan)
    x = np.moveaxis(np.asarray(params["k"]), (2, 3), (0, 1))
    rng = np.random.default_rng(1)
    tangent = h.tangent("sphere", rng, x, 0.5)
    grads = {"k": jnp.asarray(np.moveaxis(tangent + 50 * x, (0, 1), (2, 3)))}
    tx = optax.chain(fg.project(plan), fg.normalize_by_zeta(plan))
    updates, _ = tx.update(grads, tx.init(params), params)
    found = np.moveaxis(np.asarray(updates["k"]), (2, 3), (0, 1))
    for number in range(3):
        r = np.sqrt(np.sum(tangent[group == number] ** 2))
        expected = tangent[group == number] / reference.zeta(r)
        np.testing.assert_allclose(found[group == number], expected, atol=1e-12)


@pytest.mark.slow
def test_a_step_is_bounded_by_the_rate():
    """Without momentum no group moves further than 0.4143 r_t along its tangent, whatever the gradient."""
    params, plan = network(gamma=1.0)
    tx = optax.chain(fg.project(plan), fg.normalize_by_zeta(plan), optax.scale_by_learning_rate(0.5))
    for scale in (1e-3, 1.0, 1e3, 1e30):
        grads = gaussians(SHAPES, "float64", 5, scale)
        updates, _ = tx.update(grads, tx.init(params), params)
        for path in ("conv0/kernel", "conv1/kernel", "conv2/kernel"):
            squares = np.sum(np.asarray(flat(updates)[path]) ** 2, axis=(0, 1))
            group = np.asarray(plan[path].group)
            lengths = [np.sqrt(np.sum(squares[group == g])) for g in np.unique(group)]
            assert max(lengths) <= 0.5 * AT_ONE * (1 + 1e-9)


# --- feasibility


@pytest.mark.parametrize("dtype", ["float32"])
def test_ten_thousand_steps_with_momentum_stay_on_the_manifold(dtype):
    """Radius-relative, at the plan's own radius: a radius that random-walked by round-off would show."""
    params = {"kernel": jnp.zeros((3, 3, 5, 6), dtype)}
    plan = fg.plan(params, MIXED)
    params = fg.initialize(jax.random.key(0), params, plan)
    layers = layers_of(params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)

    def step(carry, key):
        params, state = carry
        grads = {"kernel": jax.random.normal(key, params["kernel"].shape, dtype)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def thousand(params, state, key):
        return jax.lax.scan(step, (params, state), jax.random.split(key, 1000))[0]

    state, start = tx.init(params), params
    for i in range(10):
        params, state = thousand(params, state, jax.random.key(i))
        assert worst_violation(params, layers) <= 1e-6, f"after {1000 * (i + 1)} steps"
    assert np.max(np.abs(params["kernel"] - start["kernel"])) > 0.01
    assert float(jax.tree.leaves(fg.violation(params, plan))[0]) <= 1e-6


# Slow, since that is compiled as users compile. Without LLVM's optimization a fused loop computes ω + v twice, once
# with a contracted multiplication and once without: where v is what a projection leaves of a vector 100 times as long,
# a column of an oblique matrix is then normalized to 2.4e-6.
@pytest.mark.slow
@pytest.mark.parametrize("retraction", h.RETRACTIONS)
@pytest.mark.parametrize("momentum", [None, 0.99])
def test_small_radii_and_steps_far_larger(retraction, momentum):
    """Steps of a thousand radii and more, as a high rate on a small gamma gives."""
    params = {"kernel": jnp.zeros((3, 3, 5, 6), jnp.float32), "wide": jnp.zeros((2, 5, 3, 4), jnp.float32)}
    stiefel = fg.Stiefel(retraction=retraction)
    plan = fg.plan(params, [("*", fg.PIO([fg.Sphere(), fg.Oblique(), stiefel]))], gamma=0.004)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(10.0, plan, momentum=momentum)

    @jax.jit
    def step(params, state, key):
        grads = {
            name: jax.random.normal(jax.random.fold_in(key, i), params[name].shape, jnp.float32)
            for i, name in enumerate(params)
        }
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, largest = tx.init(params), 0.0
    for i in range(30):
        params, state = step(params, state, jax.random.key(i))
        assert worst_violation(params, layers_of(params, plan)) <= 1e-6
        largest = max(largest, *(float(np.max(m.step_ratio)) for m in fg.metrics(state).values()))
    assert largest > 300  # the steps were as long as this test says


@pytest.mark.slow
def test_bf16_parameters_reach_bf16_roundoff():
    params, plan = network(dtype="bfloat16")
    rng = np.random.default_rng(0)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        grads = nested({p: jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for p, s in SHAPES.items()})
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_dtypes(params, updates, grads)
    # Half a unit in the last place, relative, of each entry of a slice: at most 2 sqrt(15) 2^-9 in a Gram matrix.
    assert worst_violation(params, layers_of(params, plan)) <= 2 * 15**0.5 * 2.0**-9


# --- the parameters that are not constrained


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rate", [0.1, falling(20)], ids=["constant", "falling"])
def test_a_plan_of_none_is_sgd_exactly(momentum, nesterov, rate):
    params = gaussians(SHAPES, "float32")
    plan = fg.plan(params, [("*", None)])

    def gradients(params):
        return in_dtype(slope_of_loss(in_dtype(params, "float64")), "float32")

    mine, _ = run(fg.fgsgd(rate, plan, momentum=momentum, nesterov=nesterov), params, gradients, 10)
    theirs, _ = run(optax.sgd(rate, momentum, nesterov), params, gradients, 10)
    chex.assert_trees_all_equal(mine, theirs)
    linked, _ = run(chained(plan, rate, momentum, nesterov), params, gradients, 10)
    chex.assert_trees_all_equal(linked, theirs)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_leaf_without_a_gradient_is_left_alone(momentum):
    params, plan = network(dtype="float32")
    tx, gradients = fg.fgsgd(0.1, plan, momentum=momentum), in_dtype(slope_of_loss(network()[0]), "float32")

    def without_bias(tree):
        return tree | {"conv1": tree["conv1"] | {"bias": None}}

    all_updates, _ = tx.update(gradients, tx.init(params), params)
    updates, state = tx.update(without_bias(gradients), tx.init(params), params)
    chex.assert_trees_all_equal(updates, without_bias(all_updates))
    # Its momentum is where it was, for a gradient that comes later.
    chex.assert_trees_all_equal_structs(state, tx.init(params))
    tx.update(gradients, state, params)


def test_every_link_passes_unconstrained_leaves_untouched():
    params, plan = network()
    grads = gaussians(SHAPES, "float64", 3)
    for link in (fg.project(plan), fg.normalize_by_zeta(plan), fg.retract(plan), fg.rescale(plan)):
        updates, _ = link.update(grads, link.init(params), params)
        for path in SHAPES:
            if path.endswith("bias"):
                np.testing.assert_array_equal(flat(updates)[path], flat(grads)[path])


def test_weight_decay_acts_on_euclidean_leaves_only():
    shapes = {"kernel": (3, 3, 2, 4), "dense": (4, 3), "bias": (3,)}
    params, grads = gaussians(shapes, "float64", 2), gaussians(shapes, "float64", 3)
    plan = fg.plan(params, [("kernel", fg.Each(fg.Sphere())), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)

    def constant(_):
        return grads

    plain, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, constant, 3)
    decayed, _ = run(fg.fgsgd(0.1, plan, momentum=0.9, weight_decay=0.1), params, constant, 3)
    expected, _ = run(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)), params, constant, 3)
    for path in shapes:
        theirs = expected if plan[path] is None else plain
        np.testing.assert_allclose(decayed[path], theirs[path], rtol=1e-12)
    assert np.max(np.abs(decayed["dense"] - plain["dense"])) > 1e-3


@pytest.mark.slow
def test_mask_and_labels_follow_the_plan(lenient_promotion):
    params, plan = network()
    mask, labels = flat(plan.mask()), flat(plan.labels())
    for path in SHAPES:
        assert mask[path] is (plan[path] is None)
        assert labels[path] == ("euclidean" if plan[path] is None else "manifold")
    # What they are for.
    tx = optax.partition({"manifold": fg.fgsgd(0.1, plan, momentum=0.9), "euclidean": optax.adam(1e-3)}, plan.labels())
    grads = gaussians(SHAPES, "float64", 3)
    moved, _ = run(tx, params, lambda _: grads, 3)
    adam, _ = run(optax.adam(1e-3), params, lambda _: grads, 3)
    fine, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, lambda _: grads, 3)
    for path in SHAPES:
        expected = adam if plan[path] is None else fine
        np.testing.assert_allclose(flat(moved)[path], flat(expected)[path], rtol=0, atol=1e-12)


def test_euclidean_members_get_zeta_and_nothing_else():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 4, 6)))}
    plan = fg.plan(params, [("kernel", fg.PI([fg.Stiefel(), fg.Euclidean()]))])
    initialized = fg.initialize(jax.random.key(0), params, plan)
    member, group = np.asarray(plan["kernel"].member), np.asarray(plan["kernel"].group)
    flatland = np.array([isinstance(m, fg.Euclidean) for m in plan["kernel"].manifolds])[member]
    assert flatland.sum() == 12
    before, after = (np.asarray(tree["kernel"])[:, :, flatland] for tree in (params, initialized))
    np.testing.assert_array_equal(before, after)  # left as given

    grads = {"kernel": jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 4, 6)))}
    for tx in (fg.fgsgd(0.1, plan), chained(plan, 0.1)):
        moved, _ = run(tx, initialized, lambda _: grads, 1)
        squares = np.sum(np.asarray(grads["kernel"]) ** 2, axis=(0, 1))
        for number in np.unique(group[flatland]):
            here = group == number
            z = reference.zeta(np.sqrt(np.sum(squares[here])))
            assert z > 1
            expected = np.asarray(initialized["kernel"])[:, :, here] - 0.1 * np.asarray(grads["kernel"])[:, :, here] / z
            np.testing.assert_allclose(np.asarray(moved["kernel"])[:, :, here], expected, rtol=1e-12)


# --- programs


def constants(lowered):
    """Element counts of the constants written out in a lowered program; splats, which take no room, left out."""
    sizes = []
    for dims in re.findall(r"stablehlo\.constant dense<(?:\"0x|\[)[^>]*> : tensor<([0-9x]*)x?[a-z]", lowered.as_text()):
        sizes.append(int(np.prod([int(d) for d in dims.split("x") if d] or [1])))
    return sizes


def test_constants_finds_constants():
    table = np.arange(1000)
    lowered = jax.jit(lambda x: x + jnp.asarray(table)).lower(jnp.zeros(1000, int))
    hidden = len(jax.make_jaxpr(lambda x: x + jnp.asarray(table))(jnp.zeros(1000, int)).consts)
    assert max(constants(lowered), default=0) >= 1000 or hidden


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_nothing_of_the_plans_size_is_a_constant(make):
    params = {"kernel": jnp.zeros((3, 3, 24, 40), jnp.float32), "other": jnp.zeros((3, 3, 7, 5), jnp.float32)}
    plan = fg.plan(params, [("*", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]))])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1}, momentum=0.9)
    state = tx.init(params)
    # Small tables are fine (a plan has 4 manifolds); 7 x 5 slices are not.
    assert max(constants(jax.jit(tx.update).lower(params, state, params)), default=0) < 35
    closed_over = jax.make_jaxpr(tx.update)(params, state, params).consts
    assert max((np.size(c) for c in closed_over), default=0) < 35
    # The state is where it is instead, and it is all arrays: a checkpoint holds it.
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) >= 24 * 40
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_plans_of_two_seeds_share_a_program(make):
    def setting(seed):
        params, plan = network(seed)
        return (
            params,
            plan,
            make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1}, momentum=0.9),
        )

    grads = gaussians(SHAPES, "float64", 3)
    (params_0, plan_0, tx_0), (params_1, plan_1, tx_1) = setting(0), setting(1)
    assert np.any(np.asarray(plan_0["conv1/kernel"].member) != np.asarray(plan_1["conv1/kernel"].member))
    step = jax.jit(tx_0.update)
    state_0, state_1 = tx_0.init(params_0), tx_1.init(params_1)
    chex.assert_trees_all_equal_structs(state_0, state_1)
    first, _ = step(grads, state_0, params_0)
    assert step._cache_size() == 1
    # The compiled program of seed 0, given seed 1's state, does what seed 1's own does.
    shared, state_1 = step(grads, state_1, params_1)
    own, _ = tx_1.update(grads, tx_1.init(params_1), params_1)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(shared, own, rtol=0, atol=1e-12)
    assert np.max(np.abs(flat(shared)["conv1/kernel"] - flat(first)["conv1/kernel"])) > 1e-3
    # Nor does a second step compile again: the state's types are stable, weak ones included.
    step(grads, state_1, optax.apply_updates(params_1, shared))
    assert step._cache_size() == 1


def test_the_program_does_not_grow_with_layers():
    """Slices of one shape are handled together, whatever layer they are from."""

    def operations(depth):
        params = {f"conv{i}": {"kernel": jnp.zeros((3, 3, 4, 6 + 2 * (i % 3)), jnp.float32)} for i in range(depth)}
        plan = fg.plan(params, MIXED)
        params = fg.initialize(jax.random.key(0), params, plan)
        tx = fg.fgsgd(0.1, plan, momentum=0.9)
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        heavy = ("dot_general", "svd", "qr", "while", "cond", "rsqrt", "sqrt")
        return sum(e.primitive.name in heavy for e in h.equations(jaxpr.jaxpr))

    assert 0 < operations(3) == operations(9)


@pytest.mark.slow
def test_update_runs_under_vmap():
    """Two replicas of one plan, trained side by side."""
    params, plan = network()
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    grads = [gaussians(SHAPES, "float64", number) for number in (3, 4)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    together, _ = jax.vmap(lambda g: tx.update(g, tx.init(params), params))(both)
    for i in range(2):
        alone, _ = tx.update(grads[i], tx.init(params), params)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[i], together), alone, rtol=0, atol=1e-12)  # noqa: B023


def test_a_state_may_be_donated():
    """No two of its leaves are one buffer, which XLA refuses to be given twice."""
    params, plan = network()
    options: dict[str, Any] = {"every": 2, "warmup": (2, 4)}
    for tx in (
        fg.fgsgd(0.1, plan, momentum=0.9, **options),
        fg.rescale(plan, **options),
        fg.on_manifolds(optax.adam(0.1), plan, **options),
        fg.riemannian_adam(0.1, plan, **options),
    ):
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tx.init(params)) if leaf.size]
        assert len(set(buffers)) == len(buffers)


# --- radii, metrics


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_radii_are_the_plans_gamma_without_moments(make):
    params, plan = network()
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1})
    _, state = run(tx, params, slope_of_loss, 3)
    radii = fg.radii(state)
    constrained = {path for path in SHAPES if plan[path] is not None}
    assert set(radii) == constrained
    for path in constrained:
        grid = np.shape(plan[path].member)
        np.testing.assert_allclose(
            np.broadcast_to(radii[path], grid), np.broadcast_to(plan[path].gamma, grid), rtol=1e-12
        )


def test_a_stated_radius_is_gamma():
    params = {"kernel": jnp.zeros((3, 3, 2, 6))}
    plan = fg.plan(params, [("kernel", fg.PI([fg.Sphere(radius=0.5), fg.Stiefel(radius=2.0), fg.Oblique()]))])
    member = np.asarray(plan["kernel"].member)
    kinds = [name_of(m)[0] for m in plan["kernel"].manifolds]
    expected = np.array([{"sphere": 0.5, "stiefel": 2.0, "oblique": (18 + 54) ** -0.5}[k] for k in kinds])[member]
    np.testing.assert_allclose(np.broadcast_to(plan["kernel"].gamma, member.shape), expected, rtol=1e-6)
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.3, plan)
    params, state = run(tx, params, lambda _: {"kernel": jnp.ones((3, 3, 2, 6))}, 5)
    np.testing.assert_allclose(np.broadcast_to(fg.radii(state)["kernel"], member.shape), expected, rtol=1e-6)
    for c, d in np.ndindex(member.shape):
        omega = np.asarray(params["kernel"])[:, :, c, d]
        assert h.violation(kinds[member[c, d]], omega, expected[c, d]) < 1e-6


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
def test_metrics_tell_what_the_step_did(make):
    params, plan = network()
    rate = 0.2
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": rate})
    layers = layers_of(params, plan)
    theirs = reference.FineGrainedSGD(flat(params), layers)
    grads = slope_of_loss(params)
    theirs.step(flat(grads), rate)
    _, state = tx.update(grads, tx.init(params), params)
    metrics = fg.metrics(state)
    assert set(metrics) == set(layers)
    for path, members in layers.items():
        zetas = [z for (where, _), z in theirs.zetas.items() if where == path]
        np.testing.assert_allclose(metrics[path].zeta_share, np.mean(np.array(zetas) > 1), atol=1e-6)
        tangents = {}
        weight, gradient = np.asarray(flat(params)[path]), np.asarray(flat(grads)[path])
        for s in members:
            tangent = h.project(s.kind, s.of(weight), s.of(gradient), s.radius)
            tangents.setdefault(s.group, []).append((s, tangent))
        ratios = []
        squares = []
        for number, group in tangents.items():
            square = sum(np.sum(t * t) for _, t in group)
            squares.append(square)
            for s, t in group:
                if s.kind != "euclidean":
                    ratios.append(rate * np.linalg.norm(t) / theirs.zetas[path, number] / s.radius)
        np.testing.assert_allclose(metrics[path].step_ratio, max(ratios), rtol=1e-6)
        # One number of R by parameter: a summary of its groups' between the smallest and their total.
        r = float(np.asarray(metrics[path].grad_norm))
        assert np.sqrt(min(squares)) * (1 - 1e-6) <= r <= np.sqrt(sum(squares)) * (1 + 1e-6)


# --- other optimizers and wrappers


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [optax.adamw(1e-2), optax.sgd(0.1, 0.9), optax.rmsprop(1e-2), optax.lion(1e-3)],
    ids=["adamw", "sgd", "rmsprop", "lion"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_any_optimizer_on_manifolds(inner, dtype, lenient_promotion):
    params, plan = network(dtype=dtype)
    grads = gaussians(SHAPES, dtype, 3)
    moved, state = run(fg.on_manifolds(inner, plan), params, lambda _: grads, 20)
    plain, _ = run(inner, params, lambda _: grads, 20)
    assert worst_violation(moved, layers_of(params, plan)) <= 1e-6
    chex.assert_trees_all_equal_dtypes(moved, params)
    for path in SHAPES:
        if plan[path] is None:
            np.testing.assert_allclose(flat(moved)[path], flat(plain)[path], rtol=1e-6, atol=1e-7)
        else:
            assert np.max(np.abs(flat(moved)[path] - flat(params)[path])) > 1e-3
    assert set(fg.radii(state)) == {path for path in SHAPES if plan[path] is not None}


def test_descent():
    """It optimizes: the nearest rotation to a matrix is found, to round-off, by fgsgd and by adam on the manifold."""
    target = h.point("stiefel", np.random.default_rng(0), (4, 4))
    params = {"w": jnp.zeros((4, 4))}
    plan = fg.plan(params, [("w", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
    start = {
        "w": jnp.asarray(h.retract("stiefel", "polar", target, h.tangent("stiefel", np.random.default_rng(1), target)))
    }

    def gradients(params):
        return {"w": params["w"] - jnp.asarray(target)}

    for tx in (fg.fgsgd(0.5, plan), fg.on_manifolds(optax.sgd(0.3), plan)):
        found, _ = run(tx, start, gradients, 100)
        np.testing.assert_allclose(found["w"], target, atol=1e-8)


@pytest.mark.slow
def test_multi_steps(lenient_promotion):
    """Accumulating four gradients is one step with their mean."""
    params, plan = network()
    tx = fg.fgsgd(0.1, plan, momentum=0.9)
    grads = [gaussians(SHAPES, "float64", number) for number in range(8)]
    wrapped = optax.MultiSteps(tx, 4).gradient_transformation()
    state, step, here = wrapped.init(params), jax.jit(wrapped.update), params
    for g in grads:
        updates, state = step(g, state, here)
        here = optax.apply_updates(here, updates)
    state, expected = tx.init(params), params
    for part in (grads[:4], grads[4:]):
        updates, state = tx.update(jax.tree.map(lambda *leaves: sum(leaves) / 4, *part), state, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(here, expected, rtol=0, atol=1e-7)  # MultiSteps averages in float32


@pytest.mark.slow
def test_inject_hyperparams(lenient_promotion):
    params, plan = network()
    grads = gaussians(SHAPES, "float64", 3)
    tx = optax.inject_hyperparams(fg.fgsgd)(learning_rate=0.1, plan=plan, momentum=0.9)
    state = tx.init(params)
    step = jax.jit(tx.update)
    first, state = step(grads, state, params)
    expected, _ = run(fg.fgsgd(0.1, plan, momentum=0.9), params, lambda _: grads, 1)
    chex.assert_trees_all_close(optax.apply_updates(params, first), expected, rtol=0, atol=1e-9)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    still, _ = step(grads, state, params)
    chex.assert_trees_all_close(still, jax.tree.map(jnp.zeros_like, params), rtol=0, atol=1e-12)
    assert step._cache_size() == 1


@pytest.mark.parametrize("power", [0.6, 1.0])
def test_robbins_monro_diverges_and_converges(power):
    """Eq. 4: the rates sum to infinity, their squares do not. True of t^-power iff 1/2 < power <= 1."""
    schedule = fg.robbins_monro(0.3, power)
    assert float(schedule(0)) == pytest.approx(0.3)
    t = np.array([1e4, 1e5, 1e6]).astype(int)
    rates = np.array([float(schedule(int(i))) for i in t])
    assert h.slope(t.astype(float), rates) == pytest.approx(-power, abs=1e-2)
    jitted = jax.jit(schedule)(jnp.asarray(7))
    np.testing.assert_allclose(jitted, schedule(7), rtol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.1, -1.0])
def test_robbins_monro_refuses_other_powers(power):
    with pytest.raises(ValueError, match=str(power)):
        fg.robbins_monro(0.3, power)


# --- wrong use


@pytest.mark.parametrize("link", ["project", "retract", "rescale", "fgsgd", "on_manifolds"])
def test_update_without_params_names_the_remedy(link):
    params, plan = network()
    tx = {
        "project": fg.project(plan),
        "retract": fg.retract(plan),
        "rescale": fg.rescale(plan),
        "fgsgd": fg.fgsgd(0.1, plan),
        "on_manifolds": fg.on_manifolds(optax.sgd(0.1), plan),
    }[link]
    with pytest.raises(ValueError, match=r"params") as error:
        tx.update(params, tx.init(params))
    assert re.search(r"update\(.*params\)", str(error.value))


@pytest.mark.parametrize("make", [fg.fgsgd, pytest.param(chained, marks=pytest.mark.slow)], ids=["fgsgd", "chain"])
@pytest.mark.parametrize("broken", ["conv1/kernel", "dense/kernel"])
def test_params_off_the_manifold_are_an_error_at_init(make, broken):
    params, plan = network()
    tx = make(plan=plan, **{"learning_rate" if make is fg.fgsgd else "rate": 0.1})
    off = flat(params)
    off[broken] = off[broken] * 1.01
    with pytest.raises(ValueError) as error:
        tx.init(nested(off))
    assert broken in str(error.value)
    assert "initialize" in str(error.value)
    assert "nearest" in str(error.value)
    # Inside jit nobody can look at the numbers.
    jax.jit(tx.init)(nested(off))


def test_params_of_another_model_are_an_error_at_init():
    params, plan = network()
    for change in ("missing", "shape"):
        other = flat(params)
        if change == "missing":
            del other["conv1/kernel"]
        else:
            other["conv1/kernel"] = jnp.zeros((3, 3, 6, 9))
        with pytest.raises(ValueError, match="conv1/kernel"):
            fg.fgsgd(0.1, plan).init(nested(other))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rho": -1.0}, "rho"),
        ({"curvature": -1.0}, "curvature"),
        ({"every": 0}, "every"),
        ({"lambda_floor": -1.0}, "lambda_floor"),
    ],
    ids=str,
)
def test_bad_options_fail_when_built(options, named):
    _, plan = network()
    with pytest.raises(ValueError, match=named):
        fg.fgsgd(0.1, plan, **options)


# --- flax


@pytest.mark.slow
def test_nnx_optimizer(users_settings):
    """init sees variables, update sees pure arrays; the paths are one and the same."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.blocks = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.conv(x))
            for block in self.blocks:
                x = x + jax.nn.relu(block(x))
            return self.head(x.mean((1, 2)))

    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    rules = [
        ("conv/kernel", MIXED[0][1]),
        ("blocks/*/kernel", fg.PIO([fg.Stiefel(), fg.Sphere()])),
        ("*", None),
    ]
    plan = fg.plan(params, rules)
    assert plan["blocks/0/kernel"] is not None
    assert plan["head/kernel"] is None
    assert plan == fg.plan(nnx.as_pure(params), rules)
    nnx.update(model, fg.initialize(jax.random.key(0), params, plan))
    optimizer = nnx.Optimizer(model, fg.fgsgd(0.05, plan, momentum=0.9), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    violations = fg.violation(nnx.state(model, nnx.Param), plan)
    assert max(float(v) for v in jax.tree.leaves(violations)) <= 1e-6
    kernel = np.asarray(model.blocks[1].kernel[...])
    collection = plan["blocks/1/kernel"]
    for s in kernel_slices(collection)(kernel.shape):
        assert h.violation(s.kind, s.of(kernel), s.radius) <= 1e-6


@pytest.mark.slow
def test_linen_train_state(users_settings):
    from flax import linen
    from flax.training.train_state import TrainState

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(8, (3, 3))(x))
            return linen.Dense(4)(x.mean((1, 2)))

    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 3))
    model = Net()
    params = model.init(jax.random.key(0), x)["params"]
    plan = fg.plan(params, [("Conv_*/kernel", MIXED[0][1]), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=fg.fgsgd(0.05, plan, momentum=0.9))

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - 1) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(10):
        state = step(state)
    assert worst_violation(state.params, layers_of(state.params, plan)) <= 1e-6
    assert np.max(np.abs(state.params["Conv_0"]["kernel"] - params["Conv_0"]["kernel"])) > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda plan: fg.fgsgd(0.05, plan, radii="fitted"),
        lambda plan: fg.on_manifolds(optax.sgd(0.05), plan, radii="fitted"),
    ],
    ids=["fgsgd", "on_manifolds"],
)
def test_a_trained_net_is_fine_tuned_at_its_own_scale(make):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((6, 4)).astype(np.float32)) @ rng.standard_normal((4, 1)).astype(np.float32)
    trained = {
        "hidden": rng.standard_normal((6, 4)).astype(np.float32),
        "out": rng.standard_normal((4, 1)).astype(np.float32),
    }

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)

    for _ in range(300):
        trained = jax.tree.map(lambda w, g: w - 0.1 * g, trained, loss(trained)[1])
    plan = fg.plan(trained, [("hidden", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)])
    params = fg.nearest(trained, plan, radii="fitted")
    tx = make(plan)
    state = tx.init(params)
    radius = float(fg.radii(state)["hidden"].squeeze())
    # The nearest multiple of orthonormal columns: the mean of the singular values.
    np.testing.assert_allclose(radius, np.linalg.svd(trained["hidden"], compute_uv=False).mean(), rtol=1e-5)
    before, step = float(loss(params)[0]), jax.jit(tx.update)
    for _ in range(100):
        updates, state = step(loss(params)[1], state, params)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)[0]) < before / 2
    assert h.violation("stiefel", params["hidden"], radius) <= 1e-6
