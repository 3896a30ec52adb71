"""Floor 4, the chain: Algorithm 1 line by line, and the Optax links made of its lines."""

from ._fgsgd import fgsgd as fgsgd
from ._hyperball import hyperball as hyperball
from ._normalize import normalize_by_zeta as normalize_by_zeta
from ._on_manifolds import on_manifolds as on_manifolds
from ._project import project as project
from ._rescale import rescale as rescale
from ._rescaling import Rescaling as Rescaling
from ._retract import retract as retract
from ._riemannian_adam import riemannian_adam as riemannian_adam
from ._schedules import robbins_monro as robbins_monro
from ._spel import manifold_muon as manifold_muon, spel as spel
from ._states import StepMetrics as StepMetrics, metrics as metrics, radii as radii, refused as refused
from ._steepest import steepest as steepest
