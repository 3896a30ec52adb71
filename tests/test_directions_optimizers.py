"""The link of steepest descent and the optimizers made of it, beside NumPy in float64."""

import functools
import json
import pathlib

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.optimize
from direction_examples import WHOLE, directions, steepest

import fgsgd_jax as fg

RULES = [
    ("stiefel", fg.Whole(fg.Stiefel(radius=2.0), view=WHOLE)),
    ("heads", fg.Whole(fg.Stiefel(), view="i h d -> 1 h i d")),
    ("slices", fg.PIO([fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()])),
    ("euclidean", fg.Whole(fg.Euclidean(), view=WHOLE)),
    ("*", None),
]


@functools.cache
def mixed():
    """Parameters by matrices, heads and slices, of several manifolds and radii, one without a collection; gradients."""
    shapes = {"stiefel": (4, 6), "heads": (6, 2, 3), "slices": (3, 3, 2, 4), "euclidean": (4, 3), "bias": (4,)}
    zeros = {path: jnp.zeros(shape, "float64") for path, shape in shapes.items()}
    params = fg.initialize(jax.random.key(0), gradients_of(zeros, 0), RULES)
    return params, gradients_of(zeros, 1)


def gradients_of(params, step):
    rng = np.random.default_rng(step)
    return {path: jnp.asarray(rng.standard_normal(x.shape), x.dtype) for path, x in params.items()}


def each_matrix(params):
    """Path, index, manifold's name and radius of every matrix."""
    plan = fg.plan(params, RULES)
    for path, collection in plan.collections.items():
        grid = collection.view.grid[:2]
        gamma = np.broadcast_to(collection.gamma, grid)
        for index in np.ndindex(grid):
            manifold = collection.manifolds[collection.member[index]]
            yield path, index, type(manifold).__name__.lower(), float(gamma[index])


def split(plan, path, tensor):
    return np.asarray(plan[path].view.split(jnp.asarray(tensor)), np.float64)


@functools.cache
def steepest_link(tangent):
    link = fg.steepest(RULES, tangent=tangent)
    return link, jax.jit(link.update)


@pytest.mark.parametrize("tangent", [True, False])
def test_link_gives_each_matrix_its_own_direction(tangent):
    params, gradients = mixed()
    plan, (link, update) = fg.plan(params, RULES), steepest_link(tangent)
    updates, _ = update(gradients, link.init(params), params)
    for path, index, kind, s in each_matrix(params):
        x, g, u = (split(plan, path, tree[path])[index] for tree in (params, gradients, updates))
        np.testing.assert_allclose(u, steepest(kind, x, g, s, tangent), rtol=0, atol=1e-8, err_msg=path)
    np.testing.assert_array_equal(updates["bias"], gradients["bias"])


def test_euclidean_heads_are_muon_by_heads():
    """A view gives each head its own msign, and free heads go where SciPy's polar factors of their momenta lead."""
    rules = [("in", fg.Whole(fg.Euclidean(), view="i h d -> 1 h i d")), ("out", fg.Each(fg.Euclidean(), view="heads"))]
    zeros = {"in": jnp.zeros((6, 2, 3), "float64"), "out": jnp.zeros((2, 3, 6), "float64")}
    params, momenta = gradients_of(zeros, 0), dict.fromkeys(zeros, 0.0)
    tx = fg.spel(0.1, rules, 0.9, free=optax.sgd(0.5))
    state, update, theirs = tx.init(params), jax.jit(tx.update), {path: np.array(x) for path, x in params.items()}
    for step in (1, 2):
        gradients = gradients_of(zeros, step)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        momenta = {path: 0.9 * momenta[path] + np.asarray(g) for path, g in gradients.items()}
        for head in range(2):
            theirs["in"][:, head] -= 0.1 * scipy.linalg.polar(momenta["in"][:, head])[0]
            theirs["out"][head] -= 0.1 * scipy.linalg.polar(momenta["out"][head])[0]
    for path, x in theirs.items():
        np.testing.assert_allclose(params[path], x, rtol=0, atol=1e-10, err_msg=path)


def test_no_gradient_no_direction():
    params, gradients = mixed()
    still = jax.tree.map(jnp.zeros_like, gradients)
    link, update = steepest_link(True)
    updates, _ = update(still, link.init(params), params)
    assert all(not np.any(update) for update in updates.values())


def test_zeta_before_a_direction_means_nothing():
    params, gradients = mixed()
    alone, update = steepest_link(True)
    behind = optax.chain(fg.project(RULES), fg.normalize_by_zeta(RULES), fg.steepest(RULES))
    expected, _ = update(gradients, alone.init(params), params)
    found, _ = jax.jit(behind.update)(gradients, behind.init(params), params)
    for path in fg.plan(params, RULES).collections:
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-9, err_msg=path)


# --- optimizers beside NumPy


class Reference:
    """One matrix at a time, from the formulas of the sources; `direction` is its rule for a momentum."""

    def __init__(self, params, direction, rate):
        self.matrices, self.plan = list(each_matrix(params)), fg.plan(params, RULES)
        self.points = {(path, index): split(self.plan, path, params[path])[index] for path, index, *_ in self.matrices}
        self.direction, self.rate = direction, rate

    def step(self, momenta):
        for path, index, kind, s in self.matrices:
            x, m = self.points[path, index], split(self.plan, path, momenta[path])[index]
            u = self.direction(kind, x, m, s)
            self.points[path, index] = h.nearest(kind, x - self.rate * u, s)

    def check(self, params, limit):
        for (path, index), x in self.points.items():
            np.testing.assert_allclose(split(self.plan, path, params[path])[index], x, rtol=0, atol=limit, err_msg=path)


MAKE = {
    "spel": lambda rules: fg.spel(0.1, rules, 0.9, free=optax.sgd(0.5)),
    "spel, coarse": lambda rules: fg.spel(0.1, rules, coarse=True, free=optax.sgd(0.5)),
    "spel, nesterov": lambda rules: fg.spel(0.1, rules, 0.9, nesterov=True, free=optax.sgd(0.5)),
    "manifold_muon": lambda rules: fg.manifold_muon(0.1, rules, 0.9, free=optax.sgd(0.5)),
    # With ε = 1: else Adam's first update is a matrix of signs, often singular.
    "hyperball": lambda rules: fg.hyperball(optax.adam(1e-2, eps=1.0), rules, 0.1),
}


# Those of which no part is of Optax's own arithmetic.
STRICT = set(MAKE) - {"hyperball"}


def fast_only(*names):
    """Every optimizer; those that are not named take long."""
    return pytest.mark.parametrize(
        "name", [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MAKE]
    )


@functools.cache
def optimizer(name):
    """One on the manifolds of RULES, and its update, compiled once for all tests of a dtype."""
    tx = MAKE[name](RULES)
    return tx, jax.jit(tx.update)


def trained(name, params, steps):
    """The gradients of every step of an optimizer, and the weights after the last."""
    tx, update = optimizer(name)
    state, gradients = tx.init(params), [gradients_of(params, step) for step in range(steps)]
    for given in gradients:
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, gradients), params


@pytest.mark.parametrize("nesterov", [pytest.param(False, marks=pytest.mark.slow), True])
def test_spel_beside_the_reference(nesterov):
    params, _ = mixed()
    theirs, bias = Reference(params, steepest, 0.1), np.asarray(params["bias"])
    buffers = dict.fromkeys(params, 0.0)
    gradients, params = trained("spel, nesterov" if nesterov else "spel", params, 5)
    for given in gradients:
        # The average (1 - μ) Σ μ^k g of the source has the direction of this sum.
        buffers = {path: 0.9 * buffers[path] + g for path, g in given.items()}
        ahead = {path: 0.9 * buffers[path] + g for path, g in given.items()}
        theirs.step(ahead if nesterov else buffers)
        bias = bias - 0.5 * given["bias"]
    theirs.check(params, 1e-8)
    np.testing.assert_allclose(params["bias"], bias, rtol=0, atol=1e-12)
    assert max(map(float, fg.violation(params, RULES).values())) <= 1e-12


def test_manifold_muon_beside_the_reference():
    """The reference takes the directions that the tests above hold against the convex solver."""
    params, _ = mixed()

    def dual(kind, x, m, s):
        if kind != "stiefel":
            return steepest(kind, x, m, s)
        # Three at once, as the tests above have it compiled.
        return np.asarray(directions("stiefel", "dual")(np.stack([x] * 3), np.stack([m] * 3), s))[0]

    theirs = Reference(params, dual, 0.1)
    buffers = dict.fromkeys(params, 0.0)
    gradients, params = trained("manifold_muon", params, 3)
    for given in gradients:
        buffers = {path: 0.9 * buffers[path] + g for path, g in given.items()}
        theirs.step(buffers)
    # Matrices that are done in one batch stop together, so that all but the slowest are found more exactly.
    theirs.check(params, 2e-2)
    assert max(map(float, fg.violation(params, RULES).values())) <= 1e-12


def test_hyperball_beside_the_reference(lenient_promotion):
    """Around Adam written out."""
    params, _ = mixed()
    theirs = Reference(params, lambda *args: steepest(*args, tangent=False), 0.1)
    first, second = ({path: np.zeros(x.shape) for path, x in params.items()} for _ in range(2))
    bias = np.asarray(params["bias"])
    gradients, params = trained("hyperball", params, 5)
    for step, given in enumerate(gradients, 1):
        adam = {}
        for path, g in given.items():
            first[path] = 0.9 * first[path] + 0.1 * g
            second[path] = 0.999 * second[path] + 0.001 * g**2
            corrected = first[path] / (1 - 0.9**step), second[path] / (1 - 0.999**step)
            adam[path] = corrected[0] / (np.sqrt(corrected[1]) + 1)
        theirs.step(adam)
        bias = bias - 1e-2 * adam["bias"]
    theirs.check(params, 1e-7)
    np.testing.assert_allclose(params["bias"], bias, rtol=0, atol=1e-9)


@fast_only("spel, nesterov", "hyperball")
def test_a_gradient_that_is_no_number_is_refused(name, request):
    if name not in STRICT:
        request.getfixturevalue("lenient_promotion")
    params, gradients = mixed()
    tx, update = optimizer(name)
    bad = {path: jnp.full_like(g, jnp.nan) if path in ("heads", "bias") else g for path, g in gradients.items()}
    updates, state = update(bad, tx.init(params), params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
    assert {path: int(count) for path, count in fg.refused(state).items() if count} == {"heads": 1, "bias": 1}
    assert np.abs(updates["heads"]).max() <= 1e-15
    assert np.abs(updates["stiefel"]).max() > 1e-3


@fast_only("spel, coarse")
def test_float32_weights_stay_on_their_manifolds(name, request):
    if name not in STRICT:
        request.getfixturevalue("lenient_promotion")
    params, _ = mixed()
    _, params = trained(name, jax.tree.map(lambda x: x.astype("float32"), params), 20)
    assert max(map(float, fg.violation(params, RULES).values())) <= 1e-6


def test_a_plan_does_as_its_rules():
    params, gradients = mixed()
    programs, states = [], []
    for rules in (RULES, fg.plan(params, RULES)):
        tx = MAKE["spel, nesterov"](rules)
        states.append(tx.init(params))
        programs.append(jax.jit(tx.update).lower(gradients, states[-1], params).as_text())
    assert programs[0] == programs[1]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_step_is_so_many_radii(lenient_promotion):
    """The learning rate is relative to the radius: the same relative step at every radius."""
    lengths = []
    for radius in (1e-3, 50.0):
        params = {"w": radius * jnp.eye(6, 4, dtype=jnp.float64)}
        tx = fg.spel(0.05, [("w", fg.Whole(fg.Stiefel(radius=radius), view=WHOLE))])
        gradients = {"w": jnp.cos(jnp.arange(24, dtype=jnp.float64)).reshape(6, 4)}
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
        lengths.append(float(jnp.linalg.norm(updates["w"])) / radius)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-6)


def test_nnx_model(users_settings):
    from flax import nnx

    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    rules = [("kernel", fg.Whole(fg.Stiefel(), view=WHOLE)), ("*", None)]
    nnx.update(model, fg.initialize(jax.random.key(0), nnx.state(model, nnx.Param), rules))
    before = model.bias[...]

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(jnp.square(model(jnp.ones((2, 6))) - 1)))(model)
        optimizer.update(model, grads)

    for make in (MAKE["spel"], MAKE["hyperball"]):
        step(model, nnx.Optimizer(model, make(rules), wrt=nnx.Param))
        assert fg.violation(nnx.state(model, nnx.Param), rules)["kernel"] <= 1e-6
    assert np.any(model.bias[...] != before)


def test_the_page_shows_the_optimal_rates_over_widths():
    """As benchmarks/widths.py found them: relative to the radius, one rate serves all widths."""
    widths = pytest.importorskip("widths")
    rows = json.loads(widths.RESULTS.read_text())["rows"]
    page = pathlib.Path(__file__).parent.parent / "docs/directions.md"
    assert widths.table(rows) in page.read_text()
    for name in ("fg.spel", "fg.manifold_muon", "fg.hyperball(adam)"):
        found = [row["optimum"] for row in rows if row["optimizer"] == name]
        assert len(found) == len(widths.WIDTHS)
        assert max(found) <= 1.5 * min(found)


def test_rows_over_widths_stand_beside_their_like_alone(tmp_path):
    """Python's standard library is other text in another Python, under the same name."""
    rows_of = pytest.importorskip("widths").rows_of
    path, header = tmp_path / "rows.json", {"steps": 60, "data": {"train": "a1"}}
    assert rows_of(path, header) == []
    path.write_text(json.dumps(header | {"rows": [1]}))
    assert rows_of(path, header) == [1]
    for changed in (header | {"data": {"train": "b2"}}, header | {"batch": 2}):
        with pytest.raises(SystemExit, match=r"has rows of other (data|batch); give another --results"):
            rows_of(path, changed)


def test_the_page_shows_the_optimal_rates_over_widths_on_text():
    widths = pytest.importorskip("text_widths")
    rows = json.loads(widths.RESULTS.read_text())["rows"]
    assert widths.table(rows) in (pathlib.Path(__file__).parent.parent / "docs/directions.md").read_text()
    for row in rows:
        assert len(row["rates"]) >= 3
        assert min(row["rates"]) < row["optimum"] < max(row["rates"])


def test_weight_decay_is_refused(lenient_promotion):
    params, _ = mixed()
    for make in (fg.spel, fg.manifold_muon):
        with pytest.raises(ValueError, match="normal to the manifold"):
            make(0.1, RULES, weight_decay=0.1)
        make(0.1, RULES, weight_decay=0.0)
    with pytest.raises(ValueError, match="decays in the optimizer inside"):
        fg.hyperball(optax.adamw(1e-3), RULES).init(params)
    fg.hyperball(optax.noisy_sgd(1e-3, key=0), RULES).init(params)
    fg.hyperball(optax.adamw(1e-3, mask=fg.plan(params, RULES).mask), RULES).init(params)


def test_displacements_that_were_changed_are_noticed():
    params, rules = {"w": jnp.eye(3, 1)}, [("w", fg.Whole(fg.Sphere(), view=WHOLE))]
    tx = optax.chain(fg.hyperball(optax.sgd(1e-3), rules), optax.scale(0.5))
    state, update = tx.init(params), jax.jit(tx.update)
    updates, state = update({"w": jnp.ones((3, 1))}, state, params)
    with pytest.raises(ValueError, match="has left its manifolds"):
        tx.update(updates, state, optax.apply_updates(params, jax.tree.map(lambda u: 9 * u, updates)))
