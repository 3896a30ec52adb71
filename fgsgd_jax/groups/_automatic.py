"""Arithmetic on weights that are shared out over a mesh with explicit axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding


def automatic(function: Callable, *args: Any, like: Any) -> Any:
    """`function(*args)`, with the shardings of `like`, whatever the shardings of the arrays in `args`.

    Where the axes of a mesh are explicit, JAX refuses products over sharded rows, decompositions, and selections
    between sharded and replicated arrays. Inside `function` those axes are automatic: the compiler finds the
    shardings, as it does on other meshes. `like` has the structure of the result. `function` must close over no array
    that lies on the mesh.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    meshes = [mesh for place in places if (mesh := jax.typeof(leaves[place]).sharding.mesh).explicit_axes]
    if not meshes:
        return function(*args)
    mesh = meshes[0]

    def called(*arrays):
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return function(*jax.tree.unflatten(structure, whole))

    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), like)
    automatically: Any = jax.sharding.auto_axes(called, axes=mesh.explicit_axes, out_sharding=shardings)
    return automatically(*(leaves[place] for place in places))
