"""Steps of large matrices shared out over devices that all hold the weights."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from ._layers import Layer, Layers, Results, joined, split

# A product of so few multiplications costs less than bringing the parts together again.
_MULTIPLICATIONS = 768


def pays(n: int, p: int, layers: Sequence[Layers]) -> bool:
    """Whether sharing out these n×p matrices pays."""
    return sum(own.radius.size for own in layers) > 1 and n * p * min(n, p) > _MULTIPLICATIONS


def step(
    mesh: Mesh, layers: Sequence[Layers], factor: Float[Array, ""], own_step: Callable[[list[Layers], Array], Results]
) -> Results:
    """See `_reference.run`; each device of the mesh takes `own_step` with its part of the matrices."""
    layer = joined(layers)
    layer, count, part = layer._replace(w=factor * layer.w), len(layer.x), PartitionSpec(mesh.axis_names)

    # Around explicit axes a context was made in which the mesh has automatic ones.
    own = mesh if jax.sharding.get_abstract_mesh().empty else None

    # Each device chooses the turns of its iteration by the matrices that it has.
    @functools.partial(jax.shard_map, mesh=own, in_specs=part, out_specs=part, check_vma=False)
    def step_part(layer: Layer) -> tuple[Array, Array]:
        own = Layers((layer.x,), (layer.w,), *layer[2:])
        (((displacement,), ratio),) = own_step([own], jnp.ones((), layer.x.dtype))
        return displacement, ratio

    def filled_up(values: Array) -> Array:
        """With the last one again, to as many as can be dealt evenly."""
        return jnp.concatenate([values, *[values[-1:]] * (-count % mesh.size)])

    displacement, ratio = step_part(jax.tree.map(filled_up, layer))
    return split(displacement[:count], ratio[:count], layers)
