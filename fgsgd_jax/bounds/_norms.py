"""Norms of groups and layers, beside what bounds them."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..groups import Plan, Radii, checked_leaves
from ..linalg import norm, spectral_norm, two_to_one
from ._layers import LayerStack, concatenations, layer_stacks
from ._unit_norms import Norms, table2, unit_bounds

# In the place of unit norms, which are positive.
_NONE, _MEASURED = -1.0, -2.0


class NormTable(NamedTuple):
    """The measured norms, upper bounds of them, and the entries of the paper's Table 2."""

    measured: Norms
    bound: Norms
    table2: Norms


class LayerNorms(NamedTuple):
    """The norms of one weight: of its groups (arrays of one number per group), and of the whole layer (scalars).

    For a stack, the groups are those of all its layers, numbered as in its collection, and `layer` holds one number per
    layer.
    """

    groups: NormTable
    layer: NormTable


def norms(params: Any, plan: Plan, radii: Radii | None = None) -> dict[str, LayerNorms]:
    """Frobenius, spectral and 2→1 norm of every group and layer, beside the valid bound and the paper's Table 2.

    The norms of a group are those of its matrices set side by side, as in Definition 1: ω_g = (ω_1, …, ω_|g|), of A
    rows and B·|g| columns. Its Gram matrix ω_g ω_gᵀ is the sum of those of its matrices, so its spectral norm is at
    most s·√|g| if theirs are at most s; the rows, whose Euclidean norms the 2→1 norm adds, stay A. A layer is all its
    matrices side by side. Nothing here is the norm of a convolution: see `conv_norms`.

    * `measured`: of the weights as they are.
    * `bound`: holds for every point of the manifolds at the given radii. With the bound f of a matrix of radius 1
      (`unit_bounds`) and the radii s: (Σ s²f²)^½, which is s·f·√|g| where the radii are equal; inf for Euclidean ones.
    * `table2`: the largest entry among the matrices, times their radius; NaN for Euclidean ones. The table is of one
      matrix, the paper uses it for groups.

    Args:
      params: the parameters.
      plan: the plan of these parameters. Each free weight is one Euclidean group, the matrix of all axes but the last
        by the last; so give a stack of free layers the scheme `Whole(Euclidean(), layers=1)`. Leaves of one axis
        (biases, scales) are left out.
      radii: of the manifolds: None for the plan's γ, or `fg.radii(opt_state)` for those of a training.

    Returns:
      The norms by path, in the weights' units and in the dtype of constraint arithmetic. May be called inside jit.

    References:
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Definition 1 and Tables 1 and 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.zeros((3, 3, 4, 6))}
      >>> plan = fg.plan(params, [("kernel", fg.PO([fg.Stiefel()]))])
      >>> params = fg.initialize(jax.random.key(0), params, plan)
      >>> groups = fg.norms(params, plan)["kernel"].groups  # γ = 90^-½, 6 groups of 4 slices
      >>> [round(float(x[0]), 3) for x in (groups.measured.frobenius, groups.bound.frobenius, groups.bound.spectral)]
      [0.365, 0.365, 0.211]
    """
    leaves, result = checked_leaves(params, plan), {}
    for stack in layer_stacks(leaves, plan):
        bucket = stack.bucket
        stacked = bucket.matrices([leaves[path] for path in bucket.paths])
        tables = _of_bucket(
            stacked,
            _radii(stack, radii, stacked.dtype),
            np.stack([collection.kind for collection in stack.collections]),
            _known(unit_bounds, stack),
            _known(table2, stack),
            concatenations(stack),
            bucket.num_groups,
        )
        for index, path in enumerate(bucket.paths):
            result[path] = _of_layer(tables, index)
    return {path: result[path] for path in leaves if path in result}


def _radii(stack: LayerStack, radii: Radii | None, dtype: jnp.dtype) -> Array:
    if radii is None or not any(collection.constrained for collection in stack.collections):
        given: list = [collection.gamma for collection in stack.collections]
    else:
        if missing := [path for path in stack.bucket.paths if path not in radii]:
            raise ValueError(
                f"radii has no entry for {missing[0]!r}: pass fg.radii(opt_state) of a state made by this plan"
            )
        given = [radii[path] for path in stack.bucket.paths]
    return jnp.stack([jnp.broadcast_to(jnp.asarray(radius, dtype), stack.bucket.grid) for radius in given])


def _known(of_manifold, stack: LayerStack) -> Float[np.ndarray, "kinds norms"]:
    """The unit norms of every kind of manifold of a stack; -1 for no entry, -2 for the measured one."""
    shape = stack.bucket.view.grid[2:]
    rows = [of_manifold(kind, shape) for kind in stack.bucket.kinds]
    return np.array([[_MEASURED if x is None else _NONE if np.isnan(x) else x for x in row] for row in rows])


@functools.partial(jax.jit, static_argnames="num_groups")
def _of_bucket(x, radius, kind, unit, entry, groups, num_groups) -> tuple[Array, Array]:
    """Measured norms, bounds and entries, three each: of groups `[paths, groups, 9]` and of `[paths, *layers, 9]`."""
    stack, rows, columns = x.shape[:-4], *x.shape[-2:]
    layers = math.prod(stack)
    matrices = x.reshape(-1, rows, columns)
    radius, kind = radius.reshape(-1, 1), jnp.asarray(kind).ravel()
    unit, entry = (jnp.asarray(known, x.dtype)[kind] for known in (unit, entry))
    unit = radius * unit
    entry = jnp.where(entry == _MEASURED, spectral_norm(matrices)[:, None], jnp.where(entry < 0, entry, radius * entry))

    def summary(side_by_side: Array, unit: Array, entry: Array) -> Array:
        measured = (norm(side_by_side, (-2, -1)), spectral_norm(side_by_side), two_to_one(side_by_side))
        bounds = jnp.sqrt(jnp.sum(jnp.square(unit), axis=-2))
        largest = jnp.max(entry, axis=-2)
        entries = jnp.where(largest < 0, jnp.nan, largest)
        return jnp.concatenate([jnp.stack(measured, axis=-1), bounds, entries], axis=-1)

    # What fills up groups: matrices of zeros, without an entry.
    filled = jnp.concatenate([matrices, jnp.zeros((1, rows, columns), x.dtype)])
    filled_unit = jnp.pad(unit, ((0, 1), (0, 0)))
    filled_entry = jnp.pad(entry, ((0, 1), (0, 0)), constant_values=_NONE)
    of_groups = jnp.zeros((stack[0] * num_groups, 9), x.dtype)
    for numbers, members in groups:
        side_by_side = jnp.moveaxis(filled[members], -3, -2).reshape(len(members), rows, -1)
        of_groups = of_groups.at[numbers].set(summary(side_by_side, filled_unit[members], filled_entry[members]))
    side_by_side = jnp.moveaxis(x.reshape(layers, -1, rows, columns), 1, 2).reshape(layers, rows, -1)
    of_layers = summary(side_by_side, unit.reshape(layers, -1, 3), entry.reshape(layers, -1, 3))
    return of_groups.reshape(stack[0], num_groups, 9), of_layers.reshape(*stack, 9)


@jax.jit
def _of_layer(tables: tuple[Array, Array], index: int | Array) -> LayerNorms:
    # The index is traced: sliced at fixed places, every layer would be a program of its own.
    parts = (jnp.moveaxis(jax.lax.dynamic_index_in_dim(table, index, keepdims=False), -1, 0) for table in tables)
    return LayerNorms(*(NormTable(*(Norms(*part[k : k + 3]) for k in (0, 3, 6))) for part in parts))
