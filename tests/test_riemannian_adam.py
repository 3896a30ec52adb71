"""Riemannian Adam beside an implementation in float64 NumPy, written from the paper one matrix at a time."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgsgd_jax as fg

B1, B2, EPS, RATE = 0.8, 0.95, 1e-8, 0.05
MANIFOLDS = [fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]
SHAPES = {"conv": (3, 3, 4, 6), "dense": (5, 2), "bias": (6,)}


def network(dtype):
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.standard_normal(shape), dtype) for path, shape in SHAPES.items()}
    rules = [("conv", fg.PIO(MANIFOLDS)), ("dense", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o")), ("*", None)]
    plan = fg.plan(params, rules)
    return fg.initialize(jax.random.key(0), params, plan), plan


def targets(dtype):
    rng = np.random.default_rng(1)
    return {path: jnp.asarray(rng.standard_normal(shape), dtype) for path, shape in SHAPES.items()}


def points_of(plan):
    """(path, index, kind, radius) of every point; a Euclidean number is a point of its own, with the radius 1."""
    for path, shape in SHAPES.items():
        collection = plan[path]
        if collection is None:
            yield from ((path, index, "euclidean", 1.0) for index in np.ndindex(*shape))
        elif path == "dense":
            yield path, (slice(None), slice(None)), "stiefel", collection.gamma
        else:
            for c, d in np.ndindex(*collection.member.shape):
                kind = h.KINDS[(1, 2, 3, 0)[collection.member[c, d]]]
                if kind == "euclidean":
                    yield from ((path, (a, b, c, d), kind, 1.0) for a, b in np.ndindex(3, 3))
                else:
                    yield path, (slice(None), slice(None), c, d), kind, collection.gamma


def reference(params, plan, goal, steps):
    weights = {path: np.array(w, np.float64) for path, w in params.items()}
    goal = {path: np.array(w, np.float64) for path, w in goal.items()}
    memory = {}
    for t in range(1, steps + 1):
        for path, index, kind, s in points_of(plan):
            x = np.array(weights[path][index])
            gradient = x - goal[path][index]
            tangent = gradient if kind == "euclidean" else h.project(kind, x, gradient, s)
            m, v = memory.get((path, str(index)), (np.zeros_like(x), 0.0))
            m = B1 * m + (1 - B1) * tangent
            v = B2 * v + (1 - B2) * float(np.sum(tangent * tangent))
            step = -RATE * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
            y = x + step if kind == "euclidean" else h.retract(kind, "polar", x, step, s)
            memory[path, str(index)] = (m if kind == "euclidean" else h.project(kind, y, m, s)), v
            weights[path][index] = y
    return weights


def ours(tx, params, goal, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.subtract, params, goal), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float64", 1e-12), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
def test_thirty_steps_beside_the_reference(dtype, limit, lenient_promotion):
    params, plan = network(dtype)
    goal = targets(dtype)
    found, state = ours(fg.riemannian_adam(RATE, plan, B1, B2, EPS), params, goal, 30)
    expected = reference(params, plan, goal, 30)
    for path in SHAPES:
        assert found[path].dtype == params[path].dtype
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=limit, err_msg=path)
        assert np.max(np.abs(expected[path] - np.asarray(params[path]))) > 0.1
    assert max(map(float, fg.violation(found, plan).values())) <= 1e-6
    assert set(fg.radii(state)) == {"conv", "dense"}


def test_unconstrained_leaves_get_adam(lenient_promotion):
    params, plan = network("float32")
    goal = targets("float32")
    found, _ = ours(fg.riemannian_adam(RATE, plan, B1, B2, EPS), params, goal, 10)
    plain, _ = ours(optax.adam(RATE, B1, B2, EPS), params, goal, 10)
    np.testing.assert_allclose(found["bias"], plain["bias"], rtol=1e-6)


def test_coordinates_do_not_matter(lenient_promotion):
    """A rotated problem has the rotated solution: true of one moment for a point, not of one for each entry."""
    params = {"w": jnp.zeros((4, 4))}
    plan = fg.plan(params, [("w", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
    rng = np.random.default_rng(0)
    q, goal = jnp.asarray(h.point("stiefel", rng, (4, 4))), {"w": jnp.asarray(rng.standard_normal((4, 4)))}
    params = {"w": jnp.asarray(h.point("stiefel", rng, (4, 4)))}

    def gap(tx):
        straight, _ = ours(tx, params, goal, 5)
        rotated, _ = ours(tx, {"w": q @ params["w"]}, {"w": q @ goal["w"]}, 5)
        return float(jnp.max(jnp.abs(rotated["w"] - q @ straight["w"])))

    assert gap(fg.riemannian_adam(RATE, plan)) < 1e-12
    assert gap(fg.on_manifolds(optax.adam(RATE), plan)) > 1e-3


MAKERS = {
    "riemannian_adam": lambda plan: fg.riemannian_adam(RATE, plan),
    "spel": lambda plan: fg.spel(RATE, plan),
    "manifold_muon": lambda plan: fg.manifold_muon(RATE, plan),
    "hyperball": lambda plan: fg.hyperball(optax.sgd(RATE), plan),
}


@pytest.mark.parametrize("name", MAKERS)
def test_errors_name_the_optimizer(name, lenient_promotion):
    """And not a part that it is made of, which its user never wrote."""
    params = {"w": jnp.eye(4, 2, dtype=jnp.float32)}
    plan = fg.plan(params, [("w", fg.Whole(fg.Stiefel()))])
    tx = MAKERS[name](plan)
    double = jax.tree.map(lambda x: 2 * x, params)
    with pytest.raises(ValueError, match=rf"^fg.{name}: w is off.* fg.{name}\(\.\.\., initial_radii='fitted'\)"):
        tx.init(double)
    with pytest.raises(ValueError, match=f"^fg.{name}: w has left its manifolds"):
        tx.update(params, tx.init(params), double)
    with pytest.raises(ValueError, match=f"^fg.{name} needs the parameters"):
        tx.update(params, tx.init(params))


def test_injected_hyperparameters(lenient_promotion):
    params, plan = network("float32")
    goal = targets("float32")
    injected = optax.inject_hyperparams(fg.riemannian_adam)(learning_rate=RATE, plan=plan, b1=B1, b2=B2, eps=EPS)
    found, state = ours(injected, params, goal, 3)
    expected, _ = ours(fg.riemannian_adam(RATE, plan, B1, B2, EPS), params, goal, 3)
    assert set(state.hyperparams) >= {"learning_rate", "b1", "b2", "eps"}
    for path in SHAPES:
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-6)
