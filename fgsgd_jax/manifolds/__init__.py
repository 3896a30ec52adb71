"""Floor 2, geometry: the manifold of one weight, as a batch of n×p matrices. Knows nothing of networks."""

from ._euclidean import Euclidean as Euclidean
from ._manifold import (
    UNSTATED as UNSTATED,
    Manifold as Manifold,
    Steepest as Steepest,
    check_steepest as check_steepest,
)
from ._mixture import Mixture as Mixture
from ._oblique import Oblique as Oblique
from ._product import Product as Product
from ._sphere import Sphere as Sphere
from ._stiefel import Stiefel as Stiefel
