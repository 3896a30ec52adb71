"""What holds for every plan: over shapes, views, schemes, radii, dtypes and seeds drawn by hypothesis."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import chained
from hypothesis import HealthCheck, given, settings, strategies as st

import fgsgd_jax as fg

SETTINGS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

radii = st.one_of(st.none(), st.floats(1e-3, 1e3))


# Descriptions: what checks types at run time draws random numbers, which hypothesis refuses inside strategies.
kinds = st.sampled_from(["Sphere", "Oblique", "Stiefel", "Euclidean"])


@st.composite
def layer(draw, largest=9, retractions=h.RETRACTIONS):
    """A shape, and the arguments of the rule for it."""
    name = draw(st.sampled_from(["PI", "PO", "PIO", "Each", "Whole"]))
    manifolds = draw(
        st.lists(st.tuples(kinds, radii, st.sampled_from(retractions)), min_size=1, max_size=4 if "P" in name else 1)
    )
    inputs, outputs = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape, view, sizes = draw(
        st.sampled_from(
            [
                ((rows, cols, inputs, outputs), None, {}),
                ((rows, cols, inputs, outputs), "h w i o -> 1 o (h w i) 1", {}),
                ((rows * inputs, cols * outputs), "(i a) (o b) -> i o a b", {"a": rows, "b": cols}),
                ((inputs, outputs), "i o -> 1 1 i o", {}),
                ((rows, outputs, cols), "e h d -> 1 h e d", {}),
            ]
        )
    )
    return shape, name, manifolds, view, sizes


def made(kind, radius, retraction):
    options = {} if radius is None else {"radius": radius}
    return getattr(fg, kind)(**options, **({"retraction": retraction} if kind == "Stiefel" else {}))


def scheme_of(name, manifolds, view, sizes):
    manifolds = [made(*description) for description in manifolds]
    return getattr(fg, name)(manifolds if "P" in name else manifolds[0], view=view, **sizes)


def groups(name, inputs, outputs, m):
    """The counts of section 2, less what is empty."""
    by_row, by_column = inputs * min(m, outputs), outputs * min(m, inputs)
    half = -(-inputs // 2) * min(m, outputs)
    return {
        "PI": by_row,
        "PO": by_column,
        "PIO": half + (outputs if inputs >= 2 else 0),
        "Each": inputs * outputs,
        "Whole": 1,
    }[name]


@settings(max_examples=250, **SETTINGS)
@given(layers=st.lists(layer(), min_size=1, max_size=3), seed=st.integers(0, 2**40), gamma=st.floats(1e-3, 10))
def test_counts_and_round_trip_of_any_plan(layers, seed, gamma):
    params = {f"layer_{number}": jax.ShapeDtypeStruct(shape, jnp.float32) for number, (shape, *_) in enumerate(layers)}
    rules = [(path, scheme_of(*rest)) for path, (_, *rest) in zip(params, layers, strict=True)]
    plans = [fg.plan(params, rules, seed=s, gamma=gamma, degenerate="euclidean") for s in (seed, seed, seed + 1)]
    by_layer = zip(*(plan.collections.values() for plan in plans), strict=True)
    for (_, scheme), collections in zip(rules, by_layer, strict=True):
        here, _, elsewhere = collections
        inputs, outputs = here.view.grid[:2]
        m, name = len(scheme.manifolds), type(scheme).__name__
        assert here.num_groups == groups(name, inputs, outputs, m)
        np.testing.assert_array_equal(np.unique(here.group), np.arange(here.num_groups))
        # A group lies on one manifold, and in PI on one row, in PO on one column.
        for number in range(here.num_groups):
            places = np.argwhere(here.group == number)
            assert len(np.unique(here.member[here.group == number])) == 1
            if name in ("PI", "PO"):
                assert len(np.unique(places[:, ["PI", "PO"].index(name)])) == 1
            elif name == "PIO":
                assert min(len(np.unique(places[:, axis])) for axis in (0, 1)) == 1
        # Totals do not depend on the seed, and are as equal as can be line by line.
        counts, others = (np.bincount(c.member.ravel(), minlength=m) for c in (here, elsewhere))
        if name in ("PI", "PO"):
            np.testing.assert_array_equal(counts, others)
            assert np.ptp(counts) <= 1
            lines = here.member if name == "PI" else here.member.T
            assert all(np.ptp(np.bincount(line, minlength=m)) <= 1 for line in lines)
        assert counts.sum() == inputs * outputs
    assert plans[0] == plans[1]
    again = fg.Plan.from_json(plans[0].to_json())
    assert again == plans[0]
    assert again.to_json() == plans[0].to_json()
    assert (plans[0] == plans[2]) is (plans[0].seed == plans[2].seed)


# How far round-off takes a chain from what `fgsgd` does at once, in units of the radius.
TOLERANCE = {"float32": (1e-6, 2e-5), "float64": (1e-14, 1e-12)}


@pytest.mark.slow
@settings(max_examples=14, **SETTINGS)
@given(
    one=layer(largest=4, retractions=["polar", "qr"]),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(list(TOLERANCE)),
    momentum=st.sampled_from([None, 0.9]),
)
def test_feasible_descending_and_one_whatever_it_is_made_of(one, seed, dtype, momentum):
    shape, *rest = one
    params = {"weight": jnp.zeros(shape, dtype)}
    plan = fg.plan(params, [("*", scheme_of(*rest))], seed=seed, degenerate="euclidean")
    params = fg.initialize(jax.random.key(seed), params, plan)
    target = jax.random.normal(jax.random.key(seed + 1), shape, dtype)
    feasible, close = TOLERANCE[dtype]
    rate = 1e-3 * float(np.min(plan["weight"].gamma))
    chain = chained(plan, rate, momentum)

    def loss(params):
        return jnp.sum(jnp.square(params["weight"] - target)) / 2

    def trained(tx, params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = jax.lax.scan(step, (params, tx.init(params)), length=20)
        return params, state, jnp.append(values, loss(params))

    fused, state, values = jax.jit(lambda p: trained(fg.fgsgd(rate, plan, momentum=momentum), p))(params)
    linked, _, _ = jax.jit(lambda p: trained(chain, p))(params)
    for after in (fused, linked):
        assert all(float(v) <= feasible for v in fg.violation(after, plan).values())
    gamma = np.broadcast_to(np.asarray(plan["weight"].gamma), plan["weight"].view.grid[:2])
    x, y = (np.asarray(plan["weight"].view.split(tree["weight"]), np.float64) for tree in (fused, linked))
    scale = np.maximum(gamma, np.abs(x).max((-2, -1)))[..., None, None]
    assert np.max(np.abs(x - y) / scale) <= close
    # Small steps go down: at each of them where there is no momentum, from the first to the last in any case.
    if float(fg.metrics(state)["weight"].grad_norm) > 1e-2:
        assert values[-1] < values[0] or np.isclose(values[-1], values[0], rtol=10 * h.EPS[dtype])
        if momentum is None:
            assert np.all(np.diff(values) <= 10 * h.EPS[dtype] * np.abs(values[0]))
