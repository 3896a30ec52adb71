"""Floor 1, numbers: batched matrix functions at full precision. Knows nothing of weights."""

from ._cayley import cayley as cayley
from ._enclosures import (
    Interval as Interval,
    enclosed_frobenius as enclosed_frobenius,
    enclosed_spectral as enclosed_spectral,
    enclosed_two_to_one as enclosed_two_to_one,
)
from ._expm import expm as expm
from ._floats import compute_dtype as compute_dtype, largest as largest
from ._gram_iteration import gram_iteration as gram_iteration
from ._msign import msign as msign
from ._norm import norm as norm, squared_norm as squared_norm
from ._polar import (
    Products as Products,
    deviation as deviation,
    identity as identity,
    or_fallback as or_fallback,
    orthonormalize as orthonormalize,
    polar as polar,
    polar_iteration as polar_iteration,
)
from ._products import gram as gram, matmul as matmul, symmetric as symmetric, transpose as transpose
from ._qr import qf as qf
from ._spectral import spectral_norm as spectral_norm
from ._symbol import (
    block_norms as block_norms,
    largest_block as largest_block,
    torus_basis as torus_basis,
    unrolled_basis as unrolled_basis,
)
from ._two_to_one import two_to_one as two_to_one
