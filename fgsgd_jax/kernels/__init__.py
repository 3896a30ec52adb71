"""Floor 3, kernels: one step of many matrices, fast. All that exists to please a compiler or a cache lives here."""

from ._api import step as step, tangent as tangent
from ._by_platform import Program as Program, by_platform as by_platform
from ._descend import (
    PALLAS as PALLAS,
    Place as Place,
    by_parameter as by_parameter,
    descend as descend,
    descends as descends,
    matrices as matrices,
    measure as measure,
    move as move,
    planes as planes,
    unserved as unserved,
)
from ._layers import are_many as are_many, pack as pack, unpack as unpack, unstack as unstack
from ._pallas_layer import LayerType as LayerType, Planes as Planes
from ._reference import reciprocal_zeta as reciprocal_zeta
