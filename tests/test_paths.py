"""Paths: one for every leaf of every kind of tree, and patterns that find them."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx, struct
from flax.core import FrozenDict

import fgsgd_jax as fg
from fgsgd_jax.groups import by_path, from_paths
from fgsgd_jax.groups._paths import unboxed

Pair = collections.namedtuple("Pair", ["kernel", "value"])


@struct.dataclass
class Attention:
    """As equinox's modules, which are dataclasses too, it may have a field `value`."""

    query: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    value: jax.Array
    name: str = dataclasses.field(default="", metadata={"static": True})


class Keyless:
    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(Keyless, lambda x: (x.children, None), lambda _, children: Keyless(*children))


class Kind(nnx.Param):
    pass


def arrays(n):
    return [jnp.full(2, float(k)) for k in range(n)]


A, B, C = arrays(3)
TREES = {
    "dict": ({"b": {"c": A}, "a": B}, ["a", "b/c"]),
    "integer keys": ({1: A, 0: {10: B}}, ["0/10", "1"]),
    "list": ([A, [B, C]], ["0", "1/0", "1/1"]),
    "tuple": ((A, {"k": B}), ["0", "1/k"]),
    "namedtuple": (Pair(A, {"value": B}), ["kernel", "value/value"]),
    "dataclass": ({"x": Plain(A)}, ["x/value"]),
    "flax.struct": ({"attn": Attention(A, B)}, ["attn/query", "attn/value"]),
    "FrozenDict": (FrozenDict({"a": {"value": A}}), ["a/value"]),
    "no keys": ({"x": Keyless(A, B)}, ["x/0", "x/1"]),
    "None": ({"a": None, "b": A}, ["b"]),
    "an array": (A, [""]),
    "NNX": (nnx.State({"l": {"kernel": nnx.Param(A)}, "value": {"value": Kind(B)}}), ["l/kernel", "value/value"]),
    "NNX, pure": (nnx.State({"l": {"kernel": A}}), ["l/kernel"]),
    "NNX of a tree": (nnx.State({"l": nnx.Param({"value": A, "b": [B]})}), ["l/b/0", "l/value"]),
    "linen, partitioned": ({"kernel": nn.Partitioned(A, ("x",)), "value": {"bias": B}}, ["kernel", "value/bias"]),
    "slashes": ({"mlp/~/linear": {"w": A}}, ["mlp/~/linear/w"]),
}


@pytest.mark.parametrize(("tree", "paths"), TREES.values(), ids=TREES)
def test_every_leaf_has_a_path(tree, paths):
    for _ in range(2):  # the second time from what is kept
        found = by_path(tree)
        assert list(found) == paths
        assert all(one is other for one, other in zip(found.values(), jax.tree.leaves(tree), strict=True))
    again = from_paths({path: leaf + 1 for path, leaf in found.items()}, tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(np.all(leaf == before + 1) for leaf, before in zip(*map(jax.tree.leaves, (again, tree)), strict=True))
    assert list(by_path(unboxed(found, tree))) == paths


@pytest.mark.parametrize("name", ["NNX", "NNX, pure", "linen, partitioned", "flax.struct"])
def test_a_tree_without_its_boxes_is_a_prefix_of_the_tree(name):
    """So that masks fit `optax.masked` in `init`, which sees NNX's variables, and in `update`, which does not."""
    tree, paths = TREES[name]
    names = unboxed({path: path for path in paths}, tree)
    assert jax.tree.leaves(names) == paths
    found = jax.tree.map(lambda path, node: (path, jax.tree.leaves(node)), names, tree)
    assert jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple)) == [
        (path, [leaf]) for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True)
    ]


def test_equinox_modules_keep_their_fields():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        value: eqx.nn.Linear
        scale: jax.Array

    block = eqx.filter(Block(eqx.nn.Linear(2, 3, key=jax.random.key(0)), A), eqx.is_inexact_array)
    assert list(by_path(block)) == ["value/weight", "value/bias", "scale"]


def test_nnx_paths_do_not_depend_on_the_form():
    model = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False)
    state = nnx.state(model, nnx.Param)
    assert list(by_path(state)) == list(by_path(nnx.as_pure(state)))
    assert "value/kernel" in by_path(state)


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"enc/w": A, "enc": {"w": B}}, ["'enc/w'", r"\['enc'\]\['w'\]", r"\['enc/w'\]"]),
        ({"a": {"b/c": A}, "a/b": {"c": B}}, ["'a/b/c'", r"\['a'\]\['b/c'\]", r"\['a/b'\]\['c'\]"]),
        (nnx.State({"x": nnx.Param({"a": A}), "x/a": nnx.Param(B)}), ["'x/a'"]),
    ],
    ids=["dict", "deep", "NNX"],
)
def test_paths_that_coincide_are_refused(tree, named):
    """Else both leaves would get one update, even of the other's shape."""
    for call in (by_path, lambda tree: fg.plan(tree, [("*", None)]), lambda tree: from_paths({}, tree)):
        for word in named:
            with pytest.raises(ValueError, match=word):
                call(tree)


def test_structures_that_jax_takes_for_equal_are_told_apart():
    """JAX 0.10 compares dataclasses by their static fields alone."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class One:
        a: jax.Array

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Other:
        b: jax.Array

    for _ in range(2):
        assert list(by_path(One(A))) == ["a"]
        assert list(by_path(Other(A))) == ["b"]


NAMES = {"conv[0]": {"kernel": A}, "conv0": {"kernel": B}, "a*": C, "?": A, "b": [A, B]}


@pytest.mark.parametrize("path", list(by_path(NAMES)))
def test_a_name_matches_itself(path):
    """Whatever glob it would be, also where an error suggests it."""
    with pytest.raises(ValueError, match="matches no parameter") as error:
        fg.plan(NAMES, [("nothing", None)])
    assert path in str(error.value)
    assert fg.plan(NAMES, [(path, fg.Each(fg.Sphere(), view="o -> 1 1 o 1")), ("*", None)])[path] is not None


def test_names_match_from_a_component_on():
    rules = [("conv[0]/kernel", fg.Each(fg.Sphere(), view="o -> 1 1 o 1")), ("*", None)]
    plan = fg.plan({"block": NAMES}, rules)
    assert plan["block/conv[0]/kernel"] is not None
    assert plan["block/b/0"] is None
