"""The layers of a network as grids of matrices, and the groups of a layer as concatenated matrices."""

import string
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..groups import Bucket, Collection, Plan, Whole, plan as plan_of
from ..manifolds import Euclidean


class LayerStack(NamedTuple):
    """Weights of one shape and structure, with their collections."""

    bucket: Bucket
    collections: tuple[Collection, ...]


class Concatenation(NamedTuple):
    """Which matrices stand side by side in which group: groups of about one size together, so that they make an array.

    `groups[k]` is the number of the k-th of these groups, `matrices[k]` the numbers of its matrices, filled up with the
    count of all matrices, which stands for a matrix of zeros.
    """

    groups: Int[np.ndarray, " k"]
    matrices: Int[np.ndarray, "k width"]


def layer_stacks(leaves: dict[str, Array], plan: Plan) -> list[LayerStack]:
    """All weights: those of the plan's collections, and those that it leaves free as one Euclidean group each.

    A free weight is the matrix of all its axes but the last by the last. Biases and scales, which have one axis, are
    no weights.
    """
    free = {
        path: leaf
        for path, leaf in leaves.items()
        if plan[path] is None and leaf.ndim > 1 and leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    plans = [plan]
    if free:
        axes = sorted({leaf.ndim for leaf in free.values()})
        plans.append(plan_of(free, [(_has_axes(ndim), Whole(Euclidean(), view=_as_matrix(ndim))) for ndim in axes]))
    return [
        LayerStack(bucket, tuple(source.collections[path] for path in bucket.paths))
        for source in plans
        for bucket in source.buckets
    ]


def _has_axes(ndim: int):
    return lambda path, leaf: leaf.ndim == ndim


def _as_matrix(ndim: int) -> str:
    *inputs, output = string.ascii_lowercase[:ndim]
    names = " ".join(inputs)
    return f"{names} {output} -> 1 1 ({names}) {output}"


def concatenations(stack: LayerStack) -> list[Concatenation]:
    """The groups of all layers of a stack, numbered on from layer to layer, like the matrices.

    Every width is a power of two: at most half of an array is filling, and there are at most as many arrays as powers
    of two, however unequal the groups are.
    """
    count = stack.bucket.num_groups
    group = np.concatenate(
        [collection.group.ravel() + count * layer for layer, collection in enumerate(stack.collections)]
    )
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    widths = 2 ** np.ceil(np.log2(sizes)).astype(int)
    result = []
    for width in np.unique(widths):
        groups = np.flatnonzero(widths == width)
        places = np.minimum(starts[groups, None] + np.arange(width), len(order) - 1)
        inside = np.arange(width) < sizes[groups, None]
        matrices = np.where(inside, order[places], len(order))
        result.append(Concatenation(groups.astype(np.int32), matrices.astype(np.int32)))
    return result
