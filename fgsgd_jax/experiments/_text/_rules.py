"""What the weights of a GPT live on."""

import math
from typing import Any, get_args

import fgsgd_jax as fg

from .._schemes import Retraction, Rules
from ._config import FREE, Scheme
from ._gpt import EXPANSION, GPTShape

SCHEMES = tuple(name for name in get_args(Scheme) if name != "auto")

# All heads of a projection as one matrix, with the inputs as rows.
_INTO_HEADS, _OUT_OF_HEADS = "e h d -> 1 1 e (h d)", "h d e -> 1 1 (h d) e"
_TILES = "(i a) (o b) -> i o a b"


def text_rules(scheme: Scheme, shape: GPTShape, retraction: Retraction = "polar") -> Rules | None:
    """The rules of a scheme for a GPT of this shape; `None` for free weights.

    Every weight has the Frobenius norm with which free ones begin: the root of its number of outputs.

    Args:
        scheme: `euc` and `euc-heads`; `spheres` and `stiefel`, one for each matrix of a block; `heads`, a Stiefel
            manifold for each head's query, key, value and output and for each matrix of an MLP, and spheres for the
            embedding's rows; `oblique`, the same with unit columns in the MLPs; `po-heads`, the same as `heads` with
            spheres, oblique and Stiefel manifolds mixed over the heads; `pio-tiles`, with them mixed over tiles of the
            MLPs.
        shape: of the GPT.
        retraction: how Stiefel points return to their manifold.
    """
    if scheme in FREE:
        return None
    width, head, up = shape.width, shape.head_dim, math.sqrt(EXPANSION)

    def stiefel(radius: float = 1.0) -> fg.Stiefel:
        return fg.Stiefel(radius=radius, retraction=retraction)

    def whole(manifold: Any, view: str) -> Any:
        return fg.Whole(manifold, view=view)

    if scheme in ("spheres", "stiefel"):
        square = stiefel() if scheme == "stiefel" else fg.Sphere(radius=math.sqrt(width))
        wide, tall = (stiefel(up), square) if scheme == "stiefel" else (fg.Sphere(radius=up * math.sqrt(width)), square)
        return [
            (into_heads, whole(square, _INTO_HEADS)),
            ("out/kernel", whole(square, _OUT_OF_HEADS)),
            ("up/kernel", whole(wide, "matrix")),
            ("down/kernel", whole(tall, "matrix")),
            ("*", None),
        ]
    in_heads = out_heads = fg.Each(stiefel(), view="heads")
    wide, tall = whole(stiefel(up), "matrix"), whole(stiefel(), "matrix")
    if scheme == "oblique":
        wide = tall = whole(fg.Oblique(radius=1.0), "matrix")
    elif scheme == "po-heads":
        # Sphere, columns and Stiefel of equal Frobenius norm: √head.
        sphere = fg.Sphere(radius=math.sqrt(head))
        in_heads = fg.PO([sphere, fg.Oblique(radius=1.0), stiefel()], view="e h d -> 1 h e d")
        out_heads = fg.PI([sphere, fg.Oblique(radius=math.sqrt(head / width)), stiefel()], view="h d e -> h 1 d e")
    elif scheme == "pio-tiles":
        wide, tall = (_tiles(inputs, head, stiefel) for inputs in (width, EXPANSION * width))
    return [
        ("embed/embedding", fg.Each(fg.Sphere(radius=1.0), view="rows")),
        (into_heads, in_heads),
        ("out/kernel", out_heads),
        ("up/kernel", wide),
        ("down/kernel", tall),
        ("*", None),
    ]


def _tiles(inputs: int, size: int, stiefel: Any) -> Any:
    """Tiles of size×size, all of one Frobenius norm, with which a layer of so many inputs keeps its own."""
    radius = math.sqrt(size / inputs)
    manifolds = [fg.Sphere(radius=radius * math.sqrt(size)), fg.Oblique(radius=radius), stiefel(radius)]
    return fg.PIO(manifolds, view=_TILES, a=size, b=size)


def into_heads(path: str, leaf: Any) -> bool:
    """Whether a parameter is a projection to queries, keys or values."""
    del leaf
    return path.split("/")[-2:] in [[name, "kernel"] for name in ("query", "key", "value")]


def is_block_matrix(path: str) -> bool:
    """Whether a parameter is a matrix of a block: what optimizers of matrices take."""
    return path.endswith("/kernel") and "block_" in path
