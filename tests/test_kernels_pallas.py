"""The Pallas kernels, interpreted on CPU, against the manifolds' own methods and against `fgsgd` step by step.

Operation by operation: XLA on CPU takes seconds to compile what is one kernel elsewhere.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fgsgd_jax as fg
from fgsgd_jax.kernels import _pallas_tpu, _pallas_triton
from fgsgd_jax.kernels._pallas_entries import Points, serves
from fgsgd_jax.kernels._pallas_layer import LayerType, figures

FORMS = {"tpu": _pallas_tpu, "triton": _pallas_triton}
THREE = (fg.Sphere(), fg.Oblique(), fg.Stiefel())


def entries(x):
    """[*batch, n, p] as rows of entries."""
    return [[x[..., i, j] for j in range(x.shape[-1])] for i in range(x.shape[-2])]


def matrices(entries):
    return jnp.stack([jnp.stack(row, -1) for row in entries], -2)


def arguments(plan, path):
    """What a kernel is told of a layer of a plan: its static part, kinds and codes."""
    collection = plan.collections[path]
    inputs, outputs = collection.group.shape
    members, number = len(collection.manifolds), collection.num_groups
    if number in (1, inputs * outputs):
        grouping, code = "layer" if number == 1 else "matrix", None
    else:
        grouping = {"PI": "row", "PO": "column", "PIO": "row or column"}[collection.scheme]
        # The groups of PIO's columns come first.
        of_columns = (collection.group < outputs) & (grouping == "row or column")
        code = jnp.asarray(collection.member + members * of_columns, jnp.int8)
    kind = jnp.asarray(collection.kind, jnp.int8) if len(collection.kinds) > 1 else None
    return LayerType(collection.kinds, grouping, members), kind, code


class Trainer:
    """Steps of one kernel by a form."""

    def __init__(self, form, plan, rate=0.1, momentum=0.9, nesterov=False, rho=1.0, curvature=0.0, decay=0.0):
        self.form, self.plan = form, plan
        layer, self.kind, self.code = arguments(plan, "kernel")
        self.layer = dataclasses.replace(layer, nesterov=nesterov)
        self.scalars = jnp.array([-rate, momentum or 0.0, rho, curvature, decay], jnp.float32)
        grid = plan.collections["kernel"].group.shape
        self.radius = jnp.broadcast_to(jnp.asarray(plan.collections["kernel"].gamma, jnp.float32), grid)
        self.has_momentum = momentum is not None

    def init(self, x):
        return jnp.zeros(x.shape, jnp.float32) if self.has_momentum else None

    def step(self, x, g, m, new_radius=None):
        with jax.disable_jit():
            found = self.form.descend(
                self.layer, self.scalars, x, g, m, self.kind, self.radius, new_radius, self.code, interpret=True
            )
            return found, figures(self.scalars, [found])[0]


CASES = {
    "PIO": ((3, 3, 4, 6), fg.PIO(THREE), {"momentum": 0.9}),
    "PI": ((3, 3, 3, 5), fg.PI(THREE), {"momentum": 0.9, "nesterov": True}),
    "PO": ((3, 3, 5, 3), fg.PO((fg.Euclidean(), fg.Stiefel())), {"momentum": None, "rho": 0.5, "curvature": 2.0}),
    "Whole": ((3, 3, 2, 2), fg.Whole(fg.Stiefel()), {"momentum": 0.5}),
    "Each": ((3, 1, 2, 3), fg.Each(fg.Oblique()), {"momentum": 0.5}),
    "Euclidean": ((2, 3, 2, 3), fg.Whole(fg.Euclidean()), {"momentum": 0.5, "weight_decay": 0.1}),
    "tall": ((5, 2, 1, 3), fg.PO(THREE), {"momentum": 0.9}),
    "blocks": ((1, 3, 70, 6), fg.PIO((fg.Sphere(), fg.Stiefel())), {"momentum": 0.9}),
    "swapped": ((2, 1, 70, 3), fg.PIO(THREE), {"momentum": 0.9}),
}


@functools.cache
def trained(case, dtype=jnp.float32):
    """Two steps of `fgsgd`: plan, points, gradients, updates and figures."""
    shape, scheme, options = CASES[case]
    zeros = {"kernel": jnp.zeros(shape, dtype)}
    with jax.numpy_dtype_promotion("standard"):
        plan = fg.plan(zeros, [("kernel", scheme)], seed=3)
        params = fg.initialize(jax.random.key(0), zeros, plan)
        rng = np.random.default_rng(0)
        tx = fg.fgsgd(0.1, plan, **options)
        state, found = tx.init(params), []
        update = jax.jit(tx.update)
        for scale in (3.0, 0.3):
            g = jnp.asarray(scale * rng.standard_normal(shape), dtype)
            updates, state = update({"kernel": g}, state, params)
            found.append((params["kernel"], g, updates["kernel"], fg.metrics(state)["kernel"]))
            params = optax.apply_updates(params, updates)
    return plan, found


@pytest.mark.parametrize("case", ["PIO", "PI", "PO", "Whole", "Each", "Euclidean", "tall"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_fgsgd(form, case):
    plan, steps = trained(case)
    options = dict(CASES[case][2])
    decay = options.pop("weight_decay", 0.0)
    trainer, m = Trainer(FORMS[form], plan, decay=decay, **options), None
    # The second step is the first one with momentum behind it.
    for x, g, update, metrics in steps[: 2 if case in ("PIO", "Euclidean") else 1]:
        found, (above, norm, refused, ratio) = trainer.step(x, g, trainer.init(x) if m is None else m)
        m = found.momentum
        np.testing.assert_allclose(found.displacement, update, rtol=0, atol=1e-6 * float(trainer.radius.max()))
        assert above / plan["kernel"].num_groups == pytest.approx(float(metrics.zeta_share))
        assert norm == pytest.approx(float(metrics.grad_norm), rel=1e-5)
        assert ratio == pytest.approx(float(metrics.step_ratio), rel=1e-5)
        assert refused == 0


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    plan, ((x, g, update, _), _) = trained("PIO", jnp.bfloat16)
    trainer = Trainer(FORMS[form], plan)
    found, _ = trainer.step(x, g, trainer.init(x))
    assert found.displacement.dtype == jnp.bfloat16
    assert found.momentum.dtype == jnp.float32
    np.testing.assert_allclose(found.displacement.astype(float), update.astype(float), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_new_radii_are_reached(form):
    plan, ((x, g, _, _), _) = trained("PIO")
    trainer = Trainer(FORMS[form], plan)
    radius = trainer.radius * jnp.linspace(0.5, 2, 4, dtype=jnp.float32)[:, None]
    found, _ = trainer.step(x, g, trainer.init(x), radius)
    violation = fg.violation({"kernel": x + found.displacement}, plan, radii={"kernel": radius})
    assert violation["kernel"] < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("case", "bad"), [("PIO", np.nan), ("Whole", np.inf), ("Each", 1e30)])
def test_gradients_without_a_finite_norm_are_refused(form, case, bad):
    plan, ((x, g, _, _), _) = trained(case)
    trainer = Trainer(FORMS[form], plan)
    m = jnp.ones(x.shape, jnp.float32)
    found, (above, norm, refused, ratio) = trainer.step(x, g.at[-1, -1, 1, 1].set(bad), m)
    same, _ = trainer.step(x, jnp.zeros_like(g), m)
    assert refused == 1
    assert above == norm == 0
    assert ratio > 0
    assert jnp.array_equal(found.displacement, same.displacement)
    assert jnp.array_equal(found.momentum, same.momentum)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan])
def test_points_stay_where_momentum_is_no_number(form, bad):
    plan, ((x, g, _, _), _) = trained("PIO")
    trainer = Trainer(FORMS[form], plan)
    found, (_, _, refused, ratio) = trainer.step(x, g, trainer.init(x).at[..., 1, 1].set(bad))
    assert refused == 0
    assert ratio == jnp.inf
    assert jnp.max(jnp.abs(found.displacement[..., 1, 1])) < 1e-7
    assert jnp.all(jnp.isfinite(found.displacement))


def test_tpu_takes_large_layers_block_by_block(monkeypatch):
    """Of the last block a part is not the layer's; and rows of 32, which do not divide 70."""
    plan, ((x, g, update, metrics), _) = trained("blocks")
    monkeypatch.setattr(_pallas_tpu, "_BLOCK", 1)
    trainer = Trainer(_pallas_tpu, plan)
    found, (_, norm, refused, ratio) = trainer.step(x, g, trainer.init(x))
    np.testing.assert_allclose(found.displacement, update, rtol=0, atol=1e-6)
    assert norm == pytest.approx(float(metrics.grad_norm), rel=1e-5)
    assert ratio == pytest.approx(float(metrics.step_ratio), rel=1e-5)
    assert refused == 0


def test_tpu_turns_layers_as_xla_lays_them():
    assert _pallas_tpu._lies_swapped((3, 3, 128, 32), jnp.dtype(jnp.float32))
    assert not _pallas_tpu._lies_swapped((3, 3, 32, 128), jnp.dtype(jnp.float32))
    assert not _pallas_tpu._lies_swapped((3, 3, 16, 16), jnp.dtype(jnp.float32))
    plan, ((x, g, update, metrics), _) = trained("swapped")
    assert _pallas_tpu._lies_swapped(x.shape, x.dtype)
    trainer = Trainer(_pallas_tpu, plan)
    found, (_, norm, _, _) = trainer.step(x, g, trainer.init(x))
    np.testing.assert_allclose(found.displacement, update, rtol=0, atol=1e-6)
    assert norm == pytest.approx(float(metrics.grad_norm), rel=1e-5)


LENGTHS = (0.0, 1e-6, 1e-3, 0.1, 0.4, 1.0, 10.0, 1e2, 1e3, 1e4)
SHAPES = [(3, 3), (2, 2), (3, 1), (9, 3), (2, 7), (5, 5)]
MAPS = [(fg.Stiefel(), shape) for shape in SHAPES] + [(manifold, (3, 2)) for manifold in (fg.Sphere(), fg.Oblique())]


@pytest.mark.parametrize(("manifold", "shape"), MAPS, ids=lambda value: getattr(type(value), "__name__", None))
def test_maps_of_every_step_length(manifold, shape):
    """Against the manifold's own in float64, whose rounding at the points is the same."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = manifold.random_point(keys[0], (len(LENGTHS), 50, *shape), jnp.float64).astype(jnp.float32)
    v = manifold.random_tangent(keys[1], x.astype(jnp.float64))
    length = jnp.linalg.norm(v, axis=(-2, -1), keepdims=True)
    lengths = jnp.array(LENGTHS)[:, None, None, None]
    v = (jnp.where(length > 0, v / jnp.where(length > 0, length, 1), 0) * lengths).astype(jnp.float32)
    radius = jnp.full(x.shape[:2], 0.5, jnp.float32)
    points = Points((manifold,), entries(0.5 * x), None, radius)
    displacement, ratio = points.displace(entries(0.5 * v), None)
    y = 2 * (0.5 * x + matrices(displacement)).astype(jnp.float64)
    assert jnp.max(manifold.violation(y)) < 1e-6
    np.testing.assert_allclose(ratio, jnp.linalg.norm(v, axis=(-2, -1)), rtol=1e-5)
    longest = float(jnp.finfo(jnp.float32).eps ** -0.5)
    reach = jnp.minimum(1.0, longest / jnp.maximum(lengths, 1e-300)) if isinstance(manifold, fg.Stiefel) else 1.0
    wanted = manifold.retract(x.astype(jnp.float64), reach * v.astype(jnp.float64))
    # Rounding of the step itself is of the order of its length.
    error = jnp.max(jnp.abs(y - wanted), axis=(1, 2, 3))
    assert jnp.all(error < 1e-6 + 3e-8 * jnp.minimum(jnp.array(LENGTHS), longest))
    projected = Points((manifold,), entries(0.5 * x), None, radius).project(entries(v))
    np.testing.assert_allclose(matrices(projected)[:6], v[:6], atol=1e-5)


@pytest.mark.parametrize("manifold", [*THREE, fg.Euclidean()], ids=lambda manifold: type(manifold).__name__)
def test_projection_is_the_manifolds(manifold):
    keys = jax.random.split(jax.random.key(0), 2)
    for shape in ((3, 3), (2, 5), (9, 3)):
        x = manifold.with_radius(2.0).random_point(keys[0], (20, *shape))
        g = jax.random.normal(keys[1], x.shape, jnp.float32)
        found = Points((manifold,), entries(x), None, jnp.full(20, 2.0, jnp.float32)).project(entries(g))
        np.testing.assert_allclose(matrices(found), manifold.with_radius(2.0).project(x, g), atol=1e-6)


@pytest.mark.parametrize("manifold", THREE, ids=lambda manifold: type(manifold).__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_step_is_taken_where_there_is_no_point(manifold, bad):
    x = manifold.random_point(jax.random.key(0), (4, 3, 3))
    v = manifold.random_tangent(jax.random.key(1), x).at[1, 2, 0].set(bad)
    displacement, ratio = Points((manifold,), entries(x), None, jnp.ones(4, jnp.float32)).displace(entries(v), None)
    np.testing.assert_allclose(x + matrices(displacement), manifold.retract(x, v), atol=1e-6)
    assert ratio[1] == jnp.inf
    assert jnp.all(jnp.isfinite(ratio[jnp.array([0, 2, 3])]))
    # What is no point is no reason to stay.
    displacement, _ = Points((manifold,), entries(jnp.zeros_like(x)), None, jnp.ones(4, jnp.float32)).displace(
        entries(v), None
    )
    assert jnp.max(manifold.violation(matrices(displacement)[1:2])) < 1e-6


def test_what_is_served():
    class Own(fg.Sphere):
        pass

    assert serves(fg.Stiefel(), 3, 3)
    assert not serves(fg.Stiefel(retraction="qr"), 3, 3)
    assert not serves(Own(), 3, 3)
    assert not serves(fg.Sphere(), 9, 9)
    layer = LayerType(THREE, "row", 3)
    for form in FORMS.values():
        assert form.serves(layer, (3, 3, 512, 512), jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
        assert not form.serves(layer, (3, 3, 8, 8), jnp.dtype(jnp.float64))
        assert not form.serves(dataclasses.replace(layer, grouping="custom"), (3, 3, 8, 8), jnp.dtype(jnp.float32))
    assert not _pallas_triton.serves(layer, (9, 3, 8, 8), jnp.dtype(jnp.float32))
    assert not _pallas_tpu.serves(layer, (3, 3, 2048, 2048), jnp.dtype(jnp.float32))


@pytest.mark.parametrize(("form", "platform", "calls"), [("tpu", "tpu", 1), ("triton", "cuda", 2)])
def test_layers_of_one_shape_share_their_kernels(form, platform, calls):
    """Lowered for the platform on any machine: one or two custom calls, in one function of all layers."""
    layer = LayerType(THREE, "row or column", 3)
    descend = jax.jit(FORMS[form].descend, static_argnums=0)
    grid, shape = (4, 6), (3, 3, 4, 6)
    one = jax.ShapeDtypeStruct(shape, jnp.float32)
    code, radius = jax.ShapeDtypeStruct(grid, jnp.int8), jax.ShapeDtypeStruct(grid, jnp.float32)

    def step(scalars, x, y, g, m, code, radius):
        return [descend(layer, scalars, each, g, m, code, radius, None, code) for each in (x, y)]

    scalars = jax.ShapeDtypeStruct((5,), jnp.float32)
    lowered = jax.jit(step).trace(scalars, one, one, one, one, code, radius).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert len(re.findall(r"custom_call @(tpu_custom_call|__gpu\$xla\.gpu\.triton)", text)) == calls
    assert text.count("call @descend") == 2


def test_branch_free():
    """No branch and no loop over turns for 3×3 matrices."""
    x = jnp.ones((4, 3, 3), jnp.float32)

    def displace(x, v):
        kind = jnp.arange(4, dtype=jnp.int32) % 3
        return Points(THREE, entries(x), kind, jnp.ones(4, jnp.float32)).displace(entries(v), None)

    names = {equation.primitive.name for equation in jax.make_jaxpr(displace)(x, x).eqns}
    assert names.isdisjoint({"cond", "while", "scan", lax.while_p.name})
