"""Stacks of layers: what `layers=k` says of a tensor is what would be said of its layers one by one."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg
from fgsgd_jax.groups import by_path

THREE = [fg.Sphere(), fg.Oblique(), fg.Stiefel()]
MEMBER = np.array([[0, 1, 2], [1, 0, 0]])
CASES = {
    "slices": ((3, 3, 4, 6), lambda **k: fg.PIO(THREE, **k)),
    "PI": ((3, 3, 4, 7), lambda **k: fg.PI(THREE, **k)),
    "PO": ((3, 3, 5, 6), lambda **k: fg.PO(THREE, **k)),
    "each": ((3, 3, 4, 6), lambda **k: fg.Each(fg.Stiefel(), **k)),
    "whole": ((8, 6), lambda **k: fg.Whole(fg.Stiefel(), **k)),
    "neurons": ((16, 8), lambda **k: fg.Each(fg.Sphere(), view="neurons", **k)),
    "heads": ((8, 2, 4), lambda **k: fg.Each(fg.Stiefel(), view="heads", **k)),
    "one-dimensional": ((3, 4, 6), lambda **k: fg.PIO(THREE, view="slices", **k)),
    "three-dimensional": ((2, 3, 3, 4, 6), lambda **k: fg.PIO(THREE, view="d h w i o -> i o (d h) w", **k)),
    "tiles": ((8, 12), lambda **k: fg.PO(THREE, view="(i a) (o b) -> i o a b", a=4, b=4, **k)),
    "custom": ((3, 3, 2, 3), lambda **k: fg.Custom(THREE, MEMBER, MEMBER, **k)),
    "radii": (
        (8, 2, 4),
        lambda **k: fg.PO([fg.Sphere(radius=jnp.array([[0.5, 2.0]])), fg.Stiefel()], view="heads", **k),
    ),
}


def stack_and_list(shape, scheme, layers, **options):
    """The plan of a stack, and those of its layers in nested lists at the same path, in the order of the stack."""
    stack = fg.plan({"w": jnp.zeros((*layers, *shape))}, [("w", scheme(layers=len(layers)))], **options)
    listed = jnp.zeros(shape)
    for length in reversed(layers):
        listed = [listed] * length
    alone = fg.plan({"w": listed}, [("*", scheme())], **options)
    return stack["w"], [alone["/".join(["w", *map(str, index)])] for index in np.ndindex(layers)]


@pytest.mark.parametrize("layers", [(3,), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize(("shape", "scheme"), CASES.values(), ids=CASES)
def test_a_stack_is_dealt_as_its_layers_one_by_one(shape, scheme, layers):
    stack, alone = stack_and_list(shape, scheme, layers, seed=3)
    grid = alone[0].view.grid[:2]
    assert stack.view == alone[0].view
    assert stack.layers == layers
    assert stack.member.shape == stack.group.shape == (*layers, *grid)
    assert stack.num_groups == sum(layer.num_groups for layer in alone)
    members, groups = stack.member.reshape(-1, *grid), stack.group.reshape(-1, *grid)
    gammas = np.broadcast_to(stack.gamma, stack.member.shape).reshape(-1, *grid)
    first = 0
    for member, group, gamma, layer in zip(members, groups, gammas, alone, strict=True):
        np.testing.assert_array_equal(member, layer.member)
        np.testing.assert_array_equal(group, layer.group + first)  # the numbers run on
        np.testing.assert_array_equal(gamma, np.broadcast_to(layer.gamma, grid))
        first += layer.num_groups


def test_layers_are_drawn_apart():
    stack, _ = stack_and_list((3, 3, 6, 12), CASES["PI"][1], (2,))
    assert np.any(stack.member[0] != stack.member[1])


def test_the_scale_is_that_of_a_layer():
    stack = fg.plan({"w": jnp.zeros((3, 16, 8))}, [("w", fg.Each(fg.Sphere(), view="neurons", layers=1))])["w"]
    assert stack.gamma == 1
    stack = fg.plan({"w": jnp.zeros((3, 3, 3, 4, 6))}, [("w", fg.Each(fg.Sphere(), layers=1))])["w"]
    np.testing.assert_allclose(stack.gamma, (9 * 10) ** -0.5)


def test_the_view_splits_stacks():
    x = jnp.arange(384.0).reshape(2, 3, 8, 2, 4)
    view = fg.plan({"w": jnp.zeros(x.shape)}, [("w", fg.Each(fg.Stiefel(), view="heads", layers=2))])["w"].view
    np.testing.assert_array_equal(view.split(x), einops.rearrange(np.asarray(x), "k l e h d -> k l 1 h e d"))
    np.testing.assert_array_equal(view.merge(view.split(x)), x)


@pytest.mark.parametrize("of_each", [False, True])
def test_custom_arrays_of_a_stack(of_each):
    """One grid for all layers, or one for each, whose groups are counted for themselves."""
    member = np.stack([MEMBER, MEMBER[::-1]]) if of_each else MEMBER
    scheme = fg.Custom(THREE, member, member, layers=1)
    found = fg.plan({"w": jnp.zeros((2, 3, 3, 2, 3))}, [("w", scheme)])["w"]
    np.testing.assert_array_equal(found.member, np.broadcast_to(member, (2, 2, 3)))
    np.testing.assert_array_equal(found.group, np.broadcast_to(member, (2, 2, 3)) + np.array([0, 3])[:, None, None])


def test_custom_arrays_that_do_not_fit_a_stack():
    scheme = fg.Custom(THREE, np.stack([MEMBER] * 3), MEMBER, layers=1)
    with pytest.raises(ValueError, match=r"w .*\(2, 2, 3\) \(layers, inputs, outputs\) or \(2, 3\)"):
        fg.plan({"w": jnp.zeros((2, 3, 3, 2, 3))}, [("w", scheme)])


def test_stacks_go_through_json_and_are_compared_and_printed():
    params = {"w": jnp.zeros((3, 3, 3, 4, 6)), "v": jnp.zeros((2, 8, 2, 4))}
    rules = [("w", fg.PIO(THREE, layers=1)), ("v", CASES["radii"][1](layers=1))]
    plan = fg.plan(params, rules)
    again = fg.Plan.from_json(plan.to_json())
    assert again == plan
    assert again["v"].layers == (2,)
    assert str(again) == str(plan)
    (row,) = (line for line in str(plan).splitlines() if line.startswith("w"))
    assert "3 layers" in row
    other = fg.plan(params, [("w", fg.PIO(THREE, view="l h w i o -> (l i) o h w")), rules[1]])
    assert "w: layers (3,) here, () there" in plan.difference(other)
    assert "w: layers () here, (3,) there" in other.difference(plan)


# As version 0.1 wrote it, before there were stacks.
VERSION_0_1 = (
    '{"format": "fgsgd_jax plan 1", "sha256": '
    '"54bc2e0193054076e3cc3db1237a284e569c7cec1a273be4f4ef8f41256225e5", "seed": 1, "order": [], '
    '"parameters": {"b": {"shape": [3], "notes": [], "collection": null}, "v": {"shape": [4, 2], "notes":'
    ' [], "collection": {"view": "i o -> 1 o i 1", "sizes": {"i": 4, "o": 2}, "scheme": "Each", '
    '"manifolds": [{"name": "Oblique"}], "groups": 2, "member": "eNpjYGBgAAAABAAB", "group": '
    '"eNpjYGBgYARiAAAMAAI=", "gamma": 0.5}}, "w": {"shape": [3, 3, 2, 3], "notes": [], "collection": '
    '{"view": "h w i o -> i o h w", "sizes": {"h": 3, "w": 3, "i": 2, "o": 3}, "scheme": "PIO", '
    '"manifolds": [{"name": "Sphere"}, {"name": "Stiefel", "retraction": "qr"}], "groups": 5, "member": '
    '"eNpjYGAEQxAAAAAkAAQ=", "group": "eNpjZmBgYIFiEGAEYiYgBgABAAAP", "gamma": 0.14907119849998599}}}}'
)


def test_plans_of_the_first_version_are_read():
    """And without stacks they are written as they were."""
    params = {"w": jnp.zeros((3, 3, 2, 3)), "v": jnp.zeros((4, 2)), "b": jnp.zeros(3)}
    rules = [
        ("w", fg.PIO([fg.Sphere(), fg.Stiefel(retraction="qr")])),
        ("v", fg.Each(fg.Oblique(radius=0.5), view="neurons")),
        ("*", None),
    ]
    plan = fg.plan(params, rules, seed=1)
    assert fg.Plan.from_json(VERSION_0_1) == plan
    assert plan.to_json() == VERSION_0_1


@pytest.mark.parametrize("layers", [-1, 1.0, True, (3,)], ids=str)
def test_layers_is_a_number_of_axes(layers):
    with pytest.raises((ValueError, TypeError), match="layers"):
        fg.Each(fg.Sphere(), layers=layers)


@pytest.mark.parametrize("shape", [(3,), (3, 4)], ids=str)
def test_axes_are_left_for_a_layer(shape):
    with pytest.raises(ValueError, match=r"w .*layers=2"):
        fg.plan({"w": jnp.zeros(shape)}, [("w", fg.Each(fg.Sphere(), layers=2))])


# --- what is computed of a stack

RULES = {
    "slices": ((3, 3, 4, 6), lambda **k: fg.PIO([*THREE, fg.Euclidean()], **k)),
    "neurons": ((8, 6), lambda **k: fg.Whole(fg.Sphere(), view="neurons", **k)),
    "heads": ((8, 2, 4), lambda **k: fg.PO([fg.Stiefel(), fg.Oblique()], view="heads", **k)),
}


@functools.cache
def stacks_and_layers(scale=1.0):
    """Stacks of (2, 3) and 3 layers drawn on their manifolds; the same layers in lists; and both plans."""
    lengths = {"slices": (2, 3), "neurons": (3,), "heads": (3,)}
    params = {name: jnp.zeros((*lengths[name], *shape)) for name, (shape, _) in RULES.items()}
    plan = fg.plan(params, [(name, scheme(layers=len(lengths[name]))) for name, (_, scheme) in RULES.items()])
    params = jax.tree.map(lambda x: scale * x, fg.initialize(jax.random.key(0), params, plan))
    lists = {name: apart(params[name], len(lengths[name])) for name in RULES}
    return params, plan, lists, fg.plan(lists, [(f"{name}/*", scheme()) for name, (_, scheme) in RULES.items()])


def apart(x, axes):
    return [apart(part, axes - 1) for part in x] if axes else x


def by_layer(found, plan):
    """What was found of a stack by the paths that its layers have in lists."""
    return {
        "/".join([path, *map(str, index)]): (value, index, path)
        for path, value in found.items()
        for index in np.ndindex(plan[path].layers)
    }


def radii_of_matrices(plan):
    return {path: 0.5 + jnp.arange(float(plan[path].member.size)).reshape(plan[path].member.shape) for path in plan}


def numbers_of_groups(collection, index):
    group = collection.group[index]
    return slice(group.min(), group.max() + 1)


def test_a_stack_is_drawn_as_its_layers_one_by_one():
    params, plan, lists, alone = stacks_and_layers()
    drawn = fg.initialize(jax.random.key(0), jax.tree.map(jnp.zeros_like, lists), alone)
    for path, (stack, index, _) in by_layer(params, plan).items():
        np.testing.assert_allclose(by_path(drawn)[path], stack[index], rtol=0, atol=1e-15)


@pytest.mark.parametrize("radii", [None, "fitted", "given"])
def test_nearest_of_a_stack_is_that_of_its_layers(radii):
    params, plan, lists, alone = stacks_and_layers(1.7)
    given = radii_of_matrices(plan)
    of_lists = {path: value[index] for path, (value, index, _) in by_layer(given, plan).items()}
    found = fg.nearest(params, plan, given if radii == "given" else radii)
    expected = by_path(fg.nearest(lists, alone, of_lists if radii == "given" else radii))
    for path, (stack, index, _) in by_layer(found, plan).items():
        np.testing.assert_allclose(stack[index], expected[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("radii", [False, True])
def test_norms_of_a_stack_are_those_of_its_layers(radii):
    params, plan, lists, alone = stacks_and_layers()
    given = radii_of_matrices(plan)
    of_lists = {path: value[index] for path, (value, index, _) in by_layer(given, plan).items()}
    found, expected = (
        fg.norms(params, plan, given if radii else None),
        fg.norms(lists, alone, of_lists if radii else None),
    )
    assert list(found) == list(plan)
    for path, (stack, index, name) in by_layer(found, plan).items():
        numbers = numbers_of_groups(plan[name], index)
        jax.tree.map(
            lambda a, b, own=numbers: np.testing.assert_allclose(a[own], b, rtol=1e-12),
            stack.groups,
            expected[path].groups,
        )
        jax.tree.map(
            lambda a, b, at=index: np.testing.assert_allclose(a[at], b, rtol=1e-12), stack.layer, expected[path].layer
        )


def test_certificates_of_a_stack_are_those_of_its_layers():
    params, plan, lists, alone = stacks_and_layers(1.7)
    found, expected = fg.certify(params, plan), fg.certify(lists, alone)
    assert found.groups == expected.groups
    assert found.holds == expected.holds
    for path, (statements, index, name) in by_layer(found.statements, plan).items():
        own = numbers_of_groups(plan[name], index)
        assert found.manifolds[name][own] == expected.manifolds[path]
        for stack, layer in zip(statements, expected.statements[path], strict=True):
            np.testing.assert_array_equal(stack.upper[own], layer.upper)
            np.testing.assert_array_equal(stack.holds[own], layer.holds)


def test_generalization_bounds_count_the_layers_of_a_stack():
    params, plan, lists, alone = stacks_and_layers()
    for delta in ("measured", "bound"):
        found = fg.generalization_bounds(params, plan, 1000, delta=delta)
        expected = fg.generalization_bounds(lists, alone, 1000, delta=delta)
        np.testing.assert_allclose(found.layers, expected.layers, rtol=1e-10)
        np.testing.assert_allclose(found.groups, expected.groups, rtol=1e-10)
