"""Floor 1, numbers: batched matrix functions at full precision. Knows nothing of weights."""

from ._cayley import cayley as cayley
from ._expm import expm as expm
from ._newton_schulz import orthonormalize as orthonormalize
from ._norm import norm as norm
from ._polar import polar as polar
from ._products import gram as gram, matmul as matmul, sym as sym
from ._qr import qf as qf
