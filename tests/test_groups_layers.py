"""Stacks of layers: what `layers=k` says of a tensor is what would be said of its layers one by one."""

import einops
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg

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
