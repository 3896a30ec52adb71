"""Floor 1, numbers: batched matrix functions at full precision. Knows nothing of weights."""

from ._cayley import cayley as cayley
from ._enclosures import (
    Interval as Interval,
    enclosed_frobenius as enclosed_frobenius,
    enclosed_spectral as enclosed_spectral,
    enclosed_two_to_one as enclosed_two_to_one,
)
from ._expm import expm as expm
from ._gram_iteration import gram_iteration as gram_iteration
from ._largest import largest as largest
from ._newton_schulz import (
    deviation as deviation,
    gram_less_eye as gram_less_eye,
    iterate as iterate,
    orthonormalize as orthonormalize,
    orthonormalize_sum as orthonormalize_sum,
    spectral_bounds as spectral_bounds,
    with_inverse_root as with_inverse_root,
    within_reach as within_reach,
)
from ._norm import norm as norm, squared_norm as squared_norm
from ._polar import polar as polar
from ._products import (
    MATRICES_LAST as MATRICES_LAST,
    Layout as Layout,
    chunks_of as chunks_of,
    few_multiplications as few_multiplications,
    filled_up as filled_up,
    gram as gram,
    layout_for as layout_for,
    matmul as matmul,
    repeated as repeated,
    upright_layout_for as upright_layout_for,
)
from ._qr import qf as qf
from ._spectral import spectral_norm as spectral_norm
from ._symbol import (
    block_norms as block_norms,
    largest_block as largest_block,
    torus_basis as torus_basis,
    unrolled_basis as unrolled_basis,
)
from ._total import sum_of_rows as sum_of_rows, total as total
from ._two_to_one import two_to_one as two_to_one
