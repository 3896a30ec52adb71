"""Floor 3, kernels: one step of many matrices, fast. All that exists to please a compiler or a cache lives here."""

from ._api import step as step, tangent as tangent
from ._many import are_many as are_many, pack as pack, unpack as unpack
from ._values import stack as stack, unstack as unstack
