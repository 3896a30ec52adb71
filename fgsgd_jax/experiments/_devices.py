"""All devices of all processes: every batch is shared out over them, of everything else each has the whole."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_IMAGES = "images"


class Devices:
    """The devices that train together."""

    def __init__(self):
        self._mesh = Mesh(np.array(jax.devices()), (_IMAGES,), axis_types=(AxisType.Auto,))
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._shared = NamedSharding(self._mesh, PartitionSpec(_IMAGES))

    def __len__(self) -> int:
        return self._mesh.size

    def whole(self, tree: Any) -> Any:
        """The arrays on every device. Every process gives the same."""
        here = sorted(self._whole.addressable_devices, key=lambda device: device.id)

        def place(leaf: Any) -> jax.Array:
            copies = [jax.device_put(leaf, device) for device in here]
            return jax.make_array_from_single_device_arrays(leaf.shape, self._whole, copies)

        return jax.tree.map(place, tree)

    def shared(self, tree: Any) -> Any:
        """The arrays, in a compiled function, with their first axis shared out."""
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self._shared), tree)

    @staticmethod
    def own(tree: Any) -> Any:
        """The process's own copy of arrays that every device has: for what other processes may not do as well."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
