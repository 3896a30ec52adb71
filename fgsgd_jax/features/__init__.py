"""Floor 4, features: the standard deviation of what enters each weight."""

from ._matrices import matrix_moments as matrix_moments
from ._moments import (
    FeatureMoments as FeatureMoments,
    batch_moments as batch_moments,
    is_moments as is_moments,
    merge_moments as merge_moments,
    merge_over as merge_over,
    psum_moments as psum_moments,
)
from ._shapes import einsum_axes as einsum_axes, output_positions as output_positions
