"""Generalization bounds by hand, and against the formulas again in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bounds_conv import operator

import fgsgd_jax as fg
from fgsgd_jax.bounds import Sample

FREE = [("*", None)]


def frobenius(a):
    return math.sqrt(float(np.sum(a**2)))


def spectral(a):
    return float(np.linalg.svd(a, compute_uv=False)[0])


def two_to_one(a):
    return float(sum(np.sqrt(np.sum(row**2)) for row in a))


def table1(layers, samples, width):
    """Table 1 of groups (matrices) by layer, in products as it is printed."""
    count = len(layers)
    products = [[math.prod(norm(g) for g in groups) for norm in (frobenius, spectral, two_to_one)] for groups in layers]
    stretch = math.prod(s for _, s, _ in products)
    return (
        2**count * math.prod(f for f, _, _ in products) / math.sqrt(samples),
        stretch / math.sqrt(samples) * sum((t / s) ** (2 / 3) for _, s, t in products) ** 1.5,
        stretch / math.sqrt(samples) * math.sqrt(count**2 * width * sum((f / s) ** 2 for f, s, _ in products)),
    )


def of_papers(layers, spectrals, references, sample, margin, confidence):
    """The papers' bounds, of the layers' operators (outputs × inputs)."""
    count, samples = len(layers), len(sample.margins)
    longest, total = max(sample.input_norms), math.sqrt(sum(x**2 for x in sample.input_norms))
    widest, outputs = max(max(a.shape) for a in layers), max(a.shape[0] for a in layers)
    stretch = math.prod(spectrals)
    root = math.sqrt(samples)
    return (
        2 ** (count - 0.5) * longest * math.prod(map(frobenius, layers)) / (margin * root),
        total * math.log(widest) / (margin * samples) * stretch
        * sum((two_to_one(a - m) / s) ** (2 / 3) for a, m, s in zip(layers, references, spectrals, strict=True)) ** 1.5
        + math.sqrt(math.log(1 / confidence) / samples),
        math.sqrt(
            longest**2 * count**2 * outputs * math.log(count * outputs) * stretch**2
            * sum((frobenius(a) / s) ** 2 for a, s in zip(layers, spectrals, strict=True))
            + math.log(count * samples / confidence)
        ) / (margin * root),
    )  # fmt: skip


def test_table_1_by_hand():
    """Layers 2I and I of three units, 100 samples: norms 2√3, 2, 6 and √3, 1, 3; ϖ = 3."""
    params = {"a": 2 * jnp.eye(3), "b": jnp.eye(3)}
    found = fg.generalization_bounds(params, fg.plan(params, FREE), 100)
    expected = (4 * 6 / 10, 2 / 10 * (2 * 3 ** (2 / 3)) ** 1.5, 2 / 10 * (4 * 3 * 6) ** 0.5)
    np.testing.assert_allclose(np.exp(found.layers), expected)
    # A free layer is one group.
    np.testing.assert_allclose(found.groups, found.layers)
    assert found.papers is None
    assert math.isnan(found.margin)


def test_the_papers_by_hand():
    """Two layers of one unit, weights 2 and 3, two samples x = 1 and x = 2 of margins 4 and 1, γ = 1."""
    params = {"a": jnp.full((1, 1), 2.0), "b": jnp.full((1, 1), 3.0)}
    sample = Sample(margins=np.array([4.0, 1.0]), input_norms=np.array([1.0, 2.0]))
    found = fg.generalization_bounds(params, fg.plan(params, FREE), sample, margin_share=0.5, confidence=0.1)
    assert (found.margin, found.margin_loss) == (1.0, 0.5)
    expected = (
        2**1.5 * 2 * 6 / 2**0.5,
        math.sqrt(math.log(10) / 2),  # ln W is 0
        math.sqrt((4 * 4 * math.log(2) * 36 * 2 + math.log(2 * 2 / 0.1)) / 2),
    )
    # Their norms are the certified ones, a little larger than the norms.
    np.testing.assert_allclose(np.exp(found.papers), expected, rtol=1e-6)


def test_against_an_independent_evaluation_in_float64():
    """A constrained and a free convolution and a Dense layer, with reference, scales and groups of slices."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 2, 3), "b": (2, 2, 3, 4), "c": (5, 4)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    plan = fg.plan(params, [("a", fg.PO([fg.Sphere(), fg.Stiefel()])), ("*", None)])
    params = fg.initialize(jax.random.key(0), params, plan)
    reference = {name: 0.5 * x for name, x in params.items()}
    geometries = {"a": fg.ConvGeometry((5, 4), padding=1, strides=2), "b": fg.ConvGeometry((3, 2), padding="SAME")}
    scales = {"a": jnp.asarray([0.5, -2.0, 1.0])}
    labels = rng.integers(0, 4, 20)
    scores, inputs = rng.standard_normal((20, 4)), rng.standard_normal((20, 5, 4, 2))
    scores[np.arange(20), labels] += 5
    sample = Sample.of(inputs, scores, labels)
    own = scores[np.arange(20), labels]
    others = [max(np.delete(row, label)) for row, label in zip(scores, labels, strict=True)]
    np.testing.assert_allclose(sample.margins, own - others)
    np.testing.assert_allclose(sample.input_norms, [frobenius(x) for x in inputs])

    found = fg.generalization_bounds(
        params, plan, sample, geometries=geometries, scales=scales, reference=reference, margin_share=0.2
    )
    assert found.margin_loss == 0.2
    assert found.margin == sorted(sample.margins)[3]
    w = {name: np.asarray(x) for name, x in params.items()}
    grid = w["a"].transpose(2, 3, 0, 1)
    number = np.asarray(plan["a"].group)
    groups = [np.concatenate(list(grid[number == g]), axis=1) for g in range(number.max() + 1)]
    whole = np.concatenate(list(grid.reshape(-1, 3, 3)), axis=1)
    free = [[w["b"].reshape(-1, 4)], [w["c"]]]
    np.testing.assert_allclose(np.exp(found.layers), table1([[whole], *free], 20, 5), rtol=1e-10)
    np.testing.assert_allclose(np.exp(found.groups), table1([groups, *free], 20, 5), rtol=1e-10)

    def operators(weights):
        scaled = weights["a"] * np.asarray(scales["a"])
        return [operator(scaled, geometries["a"]), operator(weights["b"], geometries["b"]), weights["c"].T]

    layers = operators(w)
    references = operators({name: np.asarray(x) for name, x in reference.items()})
    # The reference is the weights of before; the scale belongs to the layer as it is now.
    references[0] = operator(np.asarray(reference["a"]), geometries["a"])
    exact = of_papers(layers, list(map(spectral, layers)), references, sample, found.margin, 0.05)
    certified = fg.conv_norms(params, geometries, scales)
    spectrals = [float(certified[name].certified) for name in params]
    same = of_papers(layers, spectrals, references, sample, found.margin, 0.05)
    np.testing.assert_allclose(np.exp(found.papers), same, rtol=1e-9)
    assert np.all(np.exp(found.papers) >= np.asarray(exact) * (1 - 1e-12))
    assert np.all(np.exp(found.papers) <= np.asarray(exact) * 1.1)


def test_bounds_on_the_manifolds_are_above_the_measured_ones_and_free_weights_have_none():
    params = {"a": jnp.zeros((3, 3, 2, 4))}
    plan = fg.plan(params, [("a", fg.PO([fg.Stiefel()]))])
    params = fg.initialize(jax.random.key(0), params, plan)
    measured, bound = (fg.generalization_bounds(params, plan, 10, delta=delta) for delta in ("measured", "bound"))
    assert bound.groups.neyshabur_2015 == pytest.approx(measured.groups.neyshabur_2015)
    for name, value in measured.layers._asdict().items():
        assert getattr(bound.layers, name) >= value - 1e-12
    free = fg.generalization_bounds(params, fg.plan(params, FREE), 10, delta="bound")
    assert free.layers.neyshabur_2015 == math.inf


def test_deep_networks_overflow_nowhere():
    params = {f"{index:03d}": 1e4 * jnp.eye(2) for index in range(200)}
    found = fg.generalization_bounds(params, fg.plan(params, FREE), 100)
    log_f = math.log(1e4) + math.log(2) / 2
    assert found.layers.neyshabur_2015 == pytest.approx(200 * (math.log(2) + log_f) - math.log(10))
    assert np.all(np.isfinite(found.layers))


def test_a_margin_that_is_not_positive_bounds_nothing():
    params = {"a": jnp.eye(2)}
    sample = Sample(np.array([-1.0, 1.0]), np.array([1.0, 1.0]))
    found = fg.generalization_bounds(params, fg.plan(params, FREE), sample, margin_share=0.0)
    assert found.papers == (math.inf,) * 3
    assert found.margin_loss == 0.5


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (0, {}, "samples is 0"),
        (10, {"width": 0}, "width is 0"),
        (10, {"margin_share": 2.0}, "margin_share is 2.0"),
        (10, {"confidence": 0.0}, "confidence is 0.0"),
        (Sample(np.ones(2), np.ones(2)), {"reference": {"b": jnp.eye(2)}}, "no parameter 'a'"),
    ],
    ids=["samples", "width", "margin", "confidence", "reference"],
)
def test_numbers_that_make_no_sense_are_refused(data, options, said):
    params = {"a": jnp.eye(2)}
    with pytest.raises(ValueError, match=said):
        fg.generalization_bounds(params, fg.plan(params, FREE), data, **options)
