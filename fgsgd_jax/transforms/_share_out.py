"""Retractions of large matrices shared out over devices that all hold the weights."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from ..groups import Batch
from ..linalg import few_multiplications
from ..manifolds import Mixture


def displace(
    batch: Batch,
    mixture: Mixture,
    x: Float[Array, "*b n p"],
    w: Float[Array, "*b n p"],
    radius: Float[Array, "*b"] | None,
    tangent: bool,
    share_out: Mesh | None,
    factor: float | Array = 1.0,
) -> tuple[Float[Array, "*b n p"], Float[Array, "*b"]]:
    """`mixture.displace`, each device of the mesh with its part of the matrices.

    Small matrices cost less than bringing the parts together again, and sharded ones are shared out already: those are
    left as they are.
    """
    if share_out is None or not batch.joined or len(x) == 1 or few_multiplications(x.shape):
        return mixture.displace(x, w, radius, tangent, factor)
    w, count, part = factor * w, len(x), PartitionSpec(share_out.axis_names)

    # Around explicit axes `automatic` has made a context in which the mesh has automatic ones.
    mesh = share_out if jax.sharding.get_abstract_mesh().empty else None

    # Each device chooses the steps of its iteration by the matrices that it has.
    @partial(jax.shard_map, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    def displace_part(kind, at, x, w, radius):
        return Mixture(mixture.manifolds, kind, at).displace(x, w, radius, tangent)

    def filled_up(values: Array) -> Array:
        """With the last one again, to as many as can be dealt evenly."""
        return jnp.concatenate([values, *[values[-1:]] * (-count % share_out.size)])

    displacement, ratio = displace_part(*jax.tree.map(filled_up, (mixture.kind, mixture.radius, x, w, radius)))
    return displacement[:count], ratio[:count]
