"""Weights exactly on their manifolds, mixed as finely as one spatial kernel at a time, for any Optax chain."""

from typing import TYPE_CHECKING

from . import bounds as bounds
from .bounds import (
    ConvGeometry as ConvGeometry,
    certify as certify,
    conv_norms as conv_norms,
    generalization_bounds as generalization_bounds,
    log_lipschitz as log_lipschitz,
    norms as norms,
)
from .features import FeatureMoments as FeatureMoments, psum_moments as psum_moments
from .groups import (
    PI as PI,
    PIO as PIO,
    PO as PO,
    Collection as Collection,
    Custom as Custom,
    Each as Each,
    Plan as Plan,
    Scheme as Scheme,
    Trace as Trace,
    View as View,
    Whole as Whole,
    initialize as initialize,
    nearest as nearest,
    plan as plan,
    violation as violation,
)
from .manifolds import (
    Euclidean as Euclidean,
    Manifold as Manifold,
    Oblique as Oblique,
    Product as Product,
    Sphere as Sphere,
    Stiefel as Stiefel,
)
from .transforms import (
    Rescaling as Rescaling,
    StepMetrics as StepMetrics,
    fgsgd as fgsgd,
    hyperball as hyperball,
    manifold_muon as manifold_muon,
    metrics as metrics,
    normalize_by_zeta as normalize_by_zeta,
    on_manifolds as on_manifolds,
    project as project,
    radii as radii,
    refused as refused,
    rescale as rescale,
    retract as retract,
    riemannian_adam as riemannian_adam,
    robbins_monro as robbins_monro,
    spel as spel,
    steepest as steepest,
)

if TYPE_CHECKING:
    from . import linen as linen, nnx as nnx


def __getattr__(name: str):
    # The adapters import flax, which the core does without.
    if name in ("nnx", "linen"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
