"""The links and fgsgd beside a slow reference and against the equations, and the figures that they report."""

import chex
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from chains import chained
from networks import (
    SHAPES,
    falling,
    flat,
    gaussians,
    in_dtype,
    layers_of,
    name_of,
    nested,
    network,
    run,
    slope_of_loss,
    worst_violation,
)

import fgsgd_jax as fg

# --- beside the reference


@pytest.mark.parametrize(
    ("dtype", "limit", "options"),
    [
        pytest.param("float64", 1e-9, {}, marks=pytest.mark.slow),
        ("float64", 1e-9, {"momentum": 0.9}),
        pytest.param("float64", 1e-9, {"momentum": 0.9, "nesterov": True}, marks=pytest.mark.slow),
        pytest.param("float64", 1e-9, {"momentum": 0.5, "rho": 0.3, "curvature": 50.0}, marks=pytest.mark.slow),
        pytest.param("float32", 1e-5, {}, marks=pytest.mark.slow),
        pytest.param("float32", 1e-5, {"momentum": 0.9}, marks=pytest.mark.slow),
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
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
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
