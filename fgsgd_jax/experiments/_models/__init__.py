"""Networks behind one functional interface."""

from ._model import Model as Model
from ._registry import REGISTRY as REGISTRY, build as build
