"""Networks so small that little is compiled, and what a run of the experiments leaves behind."""

import io
import json

import jax
import numpy as np
from rich.console import Console

from fgsgd_jax.experiments._models import _nnx_resnet
from fgsgd_jax.experiments._models._shapes import CifarShape


def network(kind, blocks, *widths):
    """A network for the registry of models: of this class, with so many blocks for each of the widths."""
    shape = CifarShape(blocks, widths=widths)

    def make(num_classes, channels):
        return _nnx_resnet.functional(lambda rngs: kind(shape, num_classes, channels, rngs), channels)

    return make


# A single convolution, and three with batch normalization and a shortcut.
tiny = network(_nnx_resnet.PlainNet, 0, 4)
small = network(_nnx_resnet.CifarResNet, 1, 4)


def quiet():
    return Console(file=io.StringIO())


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def log_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines
