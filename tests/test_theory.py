"""What the convergence theorem says, on problems whose minima are known: from many starts to a stated tolerance.

Rates are those of eq. 4. Minima come from NumPy (singular values, eigenvalues) or are zero, where a teacher on the
student's manifolds made the data. Corollary 1 promises global minima; where starts end elsewhere the test says how
many of them, and that it is a local minimum they end in.
"""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgsgd_jax as fg

TOLERANCE = 1e-9
"""Of the loss above its minimum."""
CRITICAL = 1e-5
"""Of the Riemannian gradient's norm."""

SLOPE = 0.1


def matrix(manifold):
    """A Dense kernel as one point."""
    return fg.Whole(manifold, view="i o -> 1 1 i o")


def rates(r0, period):
    return fg.robbins_monro(r0, 0.75, period)


def planned(shapes, scheme):
    return fg.plan({path: jnp.zeros(shape) for path, shape in shapes.items()}, [("*", scheme)], gamma=1.0)


def drawn(plan, seed, *batch):
    """Uniform points of a plan; Euclidean ones of unit deviation."""
    keys = jax.random.split(jax.random.key(seed), batch)

    def draw(key):
        given = {path: jax.random.normal(key, entry.shape) for path, entry in plan.entries.items()}
        return fg.initialize(key, given, plan)

    for _ in batch:
        draw = jax.vmap(draw)
    return draw(keys)


def descend(tx, loss, starts, steps):
    """The ends of all starts. `loss` is given a key of its own at every step."""

    def one(params, key):
        def step(carry, number):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.fold_in(key, number))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]

    keys = jax.random.split(jax.random.key(99), len(jax.tree.leaves(starts)[0]))
    return jax.jit(jax.vmap(one))(starts, keys)


def matrices(plan, tree):
    """Every matrix of a tree, as pairs of its manifold's name and a batch [..., n, p]."""
    for path, collection in plan.collections.items():
        grid = np.moveaxis(np.asarray(collection.view.split(tree[path])), (-4, -3), (0, 1))
        for number, manifold in enumerate(collection.manifolds):
            yield type(manifold).__name__.lower(), grid[collection.member == number]


def gradient_norms(plan, loss, points):
    """‖grad L‖ of every end, projected by NumPy."""
    grads = jax.jit(jax.vmap(jax.grad(loss)))(points)
    squares = 0.0
    for (kind, x), (_, g) in zip(matrices(plan, points), matrices(plan, grads), strict=True):
        squares = squares + np.sum(helpers.norm(helpers.project(kind, x, g)) ** 2, axis=0)
    return np.sqrt(squares)


def losses(loss, points):
    return np.asarray(jax.jit(jax.vmap(loss))(points))


def leaky(x):
    return jnp.where(x > 0, x, SLOPE * x)


def with_key(loss):
    """The same loss at every step."""
    return lambda params, key: loss(params)


# Linear problems: every start comes to the minimum.


@pytest.mark.parametrize("shape", [(6, 3), (4, 4)])
def test_procrustes(shape):
    """A square orthogonal matrix keeps its determinant: the minimum is that of its component."""
    target = np.random.default_rng(0).normal(size=shape)
    plan = planned({"w": shape}, matrix(fg.Stiefel()))
    starts = drawn(plan, 1, 32)

    def loss(params):
        return 0.5 * jnp.sum((params["w"] - target) ** 2)

    ends = descend(fg.fgsgd(rates(1.0, 100.0), plan), with_key(loss), starts, 1000)
    u, s, vt = np.linalg.svd(target, full_matrices=False)
    nuclear = np.full(32, s.sum())
    if shape[0] == shape[1]:
        sides = np.linalg.det(starts["w"]) * np.linalg.det(u @ vt)
        assert (sides < 0).any()
        assert (sides > 0).any()
        nuclear -= np.where(sides < 0, 2 * s[-1], 0)
    minimum = 0.5 * (np.sum(target**2) + shape[1]) - nuclear
    np.testing.assert_allclose(losses(loss, ends), minimum, atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL


@pytest.mark.parametrize(
    ("manifold", "count"),
    [(fg.Sphere(), 1), pytest.param(fg.Stiefel(), 3, marks=pytest.mark.slow)],
)
def test_rayleigh_quotient(manifold, count):
    a = np.random.default_rng(1).normal(size=(8, 8))
    a = a @ a.T / 8
    plan = planned({"w": (8, count)}, matrix(manifold))

    def loss(params):
        return 0.5 * jnp.trace(params["w"].T @ a @ params["w"])

    ends = descend(fg.fgsgd(rates(1.0, 300.0), plan), with_key(loss), drawn(plan, 1, 64), 4000)
    np.testing.assert_allclose(losses(loss, ends), 0.5 * np.linalg.eigvalsh(a)[:count].sum(), atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL


@pytest.mark.slow
def test_principal_component_from_single_examples():
    """With noise, too, as the theorem says: the loss comes down with the rate, which goes to zero."""
    deviations = np.array([1.5, 1.0, 0.8, 0.5, 0.3])
    plan = planned({"w": (5, 1)}, matrix(fg.Sphere()))

    def loss(params, key):
        return -0.5 * jnp.sum((deviations * jax.random.normal(key, (5,))) @ params["w"]) ** 2

    gaps = []
    for steps in (1_000, 30_000):
        ends = descend(fg.fgsgd(rates(1.0, 10.0), plan), loss, drawn(plan, 1, 64), steps)
        gaps.append(0.5 * (deviations[0] ** 2 - np.sum((deviations[:, None] * ends["w"][..., 0].T) ** 2, axis=0)))
    rate = [float(rates(1.0, 10.0)(steps)) for steps in (1_000, 30_000)]
    assert np.mean(gaps[1]) < 2 * rate[1] / rate[0] * np.mean(gaps[0])
    assert max(gaps[1]) < 0.02


def linear(widths, manifold):
    plan = planned({f"w{n}": shape for n, shape in enumerate(itertools.pairwise(widths))}, matrix(manifold))
    target = np.random.default_rng(0).normal(size=(widths[0], widths[-1]))

    def loss(params):
        product = functools.reduce(jnp.matmul, (params[path] for path in sorted(params)))
        return 0.5 * jnp.sum((product - target) ** 2)

    return plan, target, loss


@pytest.mark.slow
def test_deep_linear_network():
    """Narrower and narrower Stiefel matrices have all of the Stiefel manifold as products: it is Procrustes again."""
    plan, target, loss = linear((10, 8, 6, 4), fg.Stiefel())
    ends = descend(fg.fgsgd(rates(0.5, 1000.0), plan), with_key(loss), drawn(plan, 1, 64), 4000)
    minimum = 0.5 * (np.sum(target**2) + 4) - np.linalg.svd(target, compute_uv=False).sum()
    np.testing.assert_allclose(losses(loss, ends), minimum, atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL


@pytest.mark.slow
def test_deep_linear_network_of_square_matrices():
    """Half of the starts have the wrong sign of the determinant: they end in the minimum of the other component."""
    plan, target, loss = linear((6, 6, 6, 6), fg.Stiefel())
    starts = drawn(plan, 1, 64)
    ends = descend(fg.fgsgd(rates(0.5, 1000.0), plan), with_key(loss), starts, 4000)
    s = np.linalg.svd(target, compute_uv=False)
    wrong = np.prod([np.linalg.det(w) for w in starts.values()], axis=0) * np.linalg.det(target) < 0
    minimum = 0.5 * (np.sum(target**2) + 6) - s.sum() + np.where(wrong, 2 * s[-1], 0)
    np.testing.assert_allclose(losses(loss, ends), minimum, atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL
    assert 16 < wrong.sum() < 48


# Networks, on Gaussian data that a network on the same manifolds made: the minimum is zero.


@jax.custom_jvp
def arc_cosine(cosine):
    """E[relu(⟨w, x⟩) relu(⟨v, x⟩)] for unit w, v and Gaussian x (Cho & Saul 2009); smooth where w = v."""
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    return (jnp.sin(angle) + (jnp.pi - angle) * cosine) / (2 * jnp.pi)


@arc_cosine.defjvp
def _(primals, tangents):
    (cosine,), (tangent,) = primals, tangents
    return arc_cosine(cosine), (jnp.pi - jnp.arccos(jnp.clip(cosine, -1, 1))) / (2 * jnp.pi) * tangent


def kernel(cosine):
    """E[leaky(⟨w, x⟩) leaky(⟨v, x⟩)]."""
    return SLOPE * cosine + (1 - SLOPE) ** 2 * arc_cosine(cosine)


def test_the_kernel_is_the_expectation():
    w, v, x = np.split(np.random.default_rng(0).normal(size=(100_002, 3)), [1, 2])
    w, v = w[0] / np.linalg.norm(w), v[0] / np.linalg.norm(v)
    samples = np.asarray(leaky(x @ w) * leaky(x @ v))
    assert float(kernel(w @ v)) == pytest.approx(float(samples.mean()), abs=5 * float(samples.std()) / 100_000**0.5)


def hidden_layer(manifold, units):
    """A sum of leaky ReLUs of unit weights and the exact expectation of its squared error, for Gaussian inputs."""
    plan = planned({"w": (10, units)}, matrix(manifold))
    teacher = drawn(plan, 77)["w"]

    def loss(params):
        w = params["w"]
        pairs = jnp.sum(kernel(w.T @ w)) - 2 * jnp.sum(kernel(w.T @ teacher)) + jnp.sum(kernel(teacher.T @ teacher))
        return 0.5 * pairs

    return plan, loss


def smallest_curvature(kind, loss, x):
    """The least eigenvalue of the Riemannian Hessian at a critical point, from differences of the gradient."""
    gradient = jax.jit(jax.grad(lambda w: loss({"w": w})))
    project, small = functools.partial(helpers.project, kind, x), 1e-5
    directions = [project(e.reshape(x.shape)).ravel() for e in np.eye(x.size)]
    basis = np.linalg.svd(np.array(directions))[2][: helpers.dim(kind, *x.shape)]
    hessian = []
    for b in basis:
        v = small * b.reshape(x.shape)
        plus, minus = (project(helpers.project(kind, y, gradient(y))) for y in (
            helpers.exp(kind, x, v), helpers.exp(kind, x, -v)
        ))  # fmt: skip
        hessian.append(basis @ (plus - minus).ravel() / (2 * small))
    hessian = np.array(hessian)
    return np.linalg.eigvalsh((hessian + hessian.T) / 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("manifold", [fg.Stiefel(), fg.Oblique()])
def test_few_leaky_relus(manifold):
    """Up to four units every start finds the teacher."""
    plan, loss = hidden_layer(manifold, 4)
    ends = descend(fg.fgsgd(rates(1.0, 1000.0), plan), with_key(loss), drawn(plan, 1, 64), 5000)
    np.testing.assert_allclose(losses(loss, ends), 0, atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL


@pytest.mark.slow
@pytest.mark.parametrize(("manifold", "least", "most"), [(fg.Stiefel(), 0.01, 0.15), (fg.Oblique(), 0.6, 0.9)])
def test_more_leaky_relus_have_local_minima(manifold, least, most):
    """Corollary 1 does not hold for eight units: 6 of 128 starts (Stiefel) and 97 (oblique) ended elsewhere.

    As Safran & Shamir 2018 found without constraints, for the exact expectation and orthogonal teachers too.
    """
    plan, loss = hidden_layer(manifold, 8)
    ends = descend(fg.fgsgd(rates(0.5, 1000.0), plan), with_key(loss), drawn(plan, 1, 128), 20_000)
    found, norms = losses(loss, ends), gradient_norms(plan, loss, ends)
    elsewhere = found > 1e-3
    assert found[~elsewhere].max() < TOLERANCE
    assert least < np.mean(elsewhere) < most
    critical = np.flatnonzero(elsewhere & (norms < CRITICAL))[:3]
    assert len(critical)
    for end in critical:
        assert smallest_curvature(type(manifold).__name__.lower(), loss, np.asarray(ends["w"][end])) > 1e-3


def convolution(manifolds):
    """Averages of leaky ReLUs of four patches without overlap, four filters, as Brutzkus & Globerson 2017 have one."""
    plan = planned({"kernel": (3, 3, 3, 4)}, fg.PIO(manifolds))
    teacher = drawn(plan, 77)

    def apply(params, images):
        layout = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(images, params["kernel"], (3, 3), "VALID", dimension_numbers=layout)
        return leaky(found).mean((1, 2))

    def loss(params, key):
        images = jax.random.normal(key, (32, 6, 6, 3))
        return 0.5 * jnp.mean(jnp.sum((apply(params, images) - apply(teacher, images)) ** 2, axis=-1))

    def expected(params):
        # A filter's norm is that of the teacher's, and with it the mean of its output: the variance is left.
        squares = jnp.sum(teacher["kernel"] ** 2, axis=(0, 1, 2))
        cosines = jnp.sum(params["kernel"] * teacher["kernel"], axis=(0, 1, 2)) / squares
        return 0.25 * jnp.sum(squares * (kernel(jnp.ones(())) - kernel(cosines)))

    return plan, teacher, loss, expected


def determinants(plan, params):
    """The signs of all Stiefel matrices' determinants, by start."""
    (stiefel,) = (x for kind, x in matrices(plan, params) if kind == "stiefel")
    return np.sign(np.linalg.det(stiefel))


@pytest.mark.slow
@pytest.mark.parametrize("manifolds", [[fg.Sphere()], [fg.Sphere(), fg.Oblique()]])
def test_convolution_from_minibatches(manifolds):
    """On connected manifolds every start finds the teacher, with examples that are never seen twice."""
    plan, _, loss, expected = convolution(manifolds)
    ends = descend(fg.fgsgd(rates(1.0, 1000.0), plan), loss, drawn(plan, 1, 32), 1500)
    np.testing.assert_allclose(losses(expected, ends), 0, atol=TOLERANCE)
    assert gradient_norms(plan, expected, ends).max() < CRITICAL


@pytest.mark.slow
def test_convolution_with_square_stiefel_slices():
    """PIO of all three: a start keeps the signs of its Stiefel slices' determinants, and finds the best with these.

    A 3×3 orthogonal matrix has an inner product of at most 3 with one of its component and of 1 with one of the other.
    """
    plan, teacher, loss, expected = convolution([fg.Sphere(), fg.Oblique(), fg.Stiefel()])
    starts = drawn(plan, 1, 64)
    sampled = [float(loss(jax.tree.map(lambda leaf: leaf[0], starts), jax.random.key(n))) for n in range(200)]
    assert np.mean(sampled) == pytest.approx(float(losses(expected, starts)[0]), rel=0.05)

    ends = descend(fg.fgsgd(rates(1.0, 1000.0), plan), with_key(expected), starts, 5000)
    signs, wanted = determinants(plan, starts), determinants(plan, jax.tree.map(lambda leaf: leaf[None], teacher))
    np.testing.assert_array_equal(determinants(plan, ends), signs)
    assert gradient_norms(plan, expected, ends).max() < CRITICAL
    collection = plan["kernel"]
    squares = np.where(collection.member == 0, 1.0, 3.0)
    reached = np.repeat(squares[None], 64, axis=0)
    reached[:, collection.member == 2] -= np.where(signs.T != wanted.T, 2, 0)
    of_filter = squares.sum(0)
    minima = 0.25 * np.sum(of_filter * np.asarray(kernel(1.0) - kernel(reached.sum(1) / of_filter)), axis=1)
    np.testing.assert_allclose(losses(expected, ends), minima, atol=TOLERANCE)
    assert (minima == 0).any()
    assert np.mean(minima == 0) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "count", "rate", "starts", "steps"),
    [((10, 16, 6, 3), 12, 5.0, 32, 10_000), ((10, 6, 3), 256, 8.0, 16, 25_000)],
)
def test_pyramidal_network(widths, count, rate, starts, steps):
    """Nguyen & Hein 2017: narrower and narrower layers of full rank, smooth and strictly monotone units.

    They have a first layer at least as wide as there are examples; the second case has no such layer.
    """
    shapes = {f"w{n}": shape for n, shape in enumerate(itertools.pairwise(widths))}
    plan = planned(shapes, matrix(fg.Stiefel()))
    examples = jax.random.normal(jax.random.key(3), (count, widths[0]))

    def apply(params):
        hidden = examples
        for path in sorted(params)[:-1]:
            hidden = hidden @ params[path]
            hidden = SLOPE * hidden + (1 - SLOPE) * jax.nn.softplus(10 * hidden) / 10
        return hidden @ params[max(params)]

    targets = apply(drawn(plan, 77))

    def loss(params):
        return 0.5 * jnp.mean(jnp.sum((apply(params) - targets) ** 2, axis=-1))

    ends = descend(fg.fgsgd(rates(rate, 1000.0), plan), with_key(loss), drawn(plan, 1, starts), steps)
    np.testing.assert_allclose(losses(loss, ends), 0, atol=TOLERANCE)
    assert gradient_norms(plan, loss, ends).max() < CRITICAL


# What ζ is for.


@pytest.mark.parametrize("normalized", [True, False])
def test_the_step_converges_with_zeta_and_diverges_without(normalized):
    """U V W for U on a Stiefel manifold and Euclidean V and W of two columns and rows: the minimum is Eckart & Young's.

    The gradient grows with the cube of the distance, so a rate that is too large at first is too large for ever.
    """
    shapes = {"u": (6, 4), "v": (4, 2), "w": (2, 3)}
    zeros = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    rules = [("u", matrix(fg.Stiefel())), ("*", matrix(fg.Euclidean()))]
    plan = fg.plan(zeros, rules, gamma=1.0)
    target = 3 * np.random.default_rng(0).normal(size=(6, 3))

    def loss(params):
        return 0.5 * jnp.sum((params["u"] @ params["v"] @ params["w"] - target) ** 2)

    rate = rates(1.0, 30.0)
    tx = fg.fgsgd(rate, plan) if normalized else fg.on_manifolds(optax.sgd(rate), plan)
    found = losses(loss, descend(tx, with_key(loss), drawn(plan, 1, 8), 20_000))
    if normalized:
        minimum = 0.5 * np.linalg.svd(target, compute_uv=False)[2] ** 2
        np.testing.assert_allclose(found, minimum, atol=TOLERANCE)
    else:
        # Not finite, or so large that no gradient can be squared any more.
        assert not (found < 1e10).any()
