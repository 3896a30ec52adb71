"""A small GPT in NNX: pre-norm, rotary positions, normalized queries and keys, squared ReLU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from .._models import Model

# The slowest rotation, in radians a byte, is one over this (Su et al., 2021).
ROTARY_BASE = 10_000.0

# Hidden neurons of a block by its width.
EXPANSION = 4


class GPTShape(NamedTuple):
    """What a GPT is made of."""

    vocabulary: int
    layers: int
    width: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Attention(nnx.Module):
    """Causal attention, one kernel for each of query, key, value and output, with the heads as an axis of its own."""

    def __init__(self, shape: GPTShape, rngs: nnx.Rngs):
        heads = (shape.heads, shape.head_dim)

        def projection() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(shape.width, heads, use_bias=False, rngs=rngs)

        self.query, self.key, self.value = projection(), projection(), projection()
        self.query_norm, self.key_norm = (nnx.RMSNorm(shape.head_dim, rngs=rngs) for _ in range(2))
        self.out = nnx.LinearGeneral(heads, shape.width, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "n length width"]) -> Float[Array, "n length width"]:
        query, key = rotated(self.query_norm(self.query(x))), rotated(self.key_norm(self.key(x)))
        return self.out(jax.nn.dot_product_attention(query, key, self.value(x), is_causal=True))


class MLP(nnx.Module):
    """Two layers with the square of a ReLU between them."""

    def __init__(self, shape: GPTShape, rngs: nnx.Rngs):
        hidden = EXPANSION * shape.width
        self.up = nnx.Linear(shape.width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, shape.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "n length width"]) -> Float[Array, "n length width"]:
        return self.down(jnp.square(nnx.relu(self.up(x))))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, shape: GPTShape, rngs: nnx.Rngs):
        self.norm_0, self.norm_1 = (nnx.RMSNorm(shape.width, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = Attention(shape, rngs), MLP(shape, rngs)

    def __call__(self, x: Float[Array, "n length width"]) -> Float[Array, "n length width"]:
        x = x + self.attention(self.norm_0(x))
        return x + self.mlp(self.norm_1(x))


class GPT(nnx.Module):
    """Logits of the next token at every place."""

    def __init__(self, shape: GPTShape, rngs: nnx.Rngs):
        self.embed = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        # So that the length of a token's vector does not matter, and unit vectors are no special case.
        self.embed_norm = nnx.RMSNorm(shape.width, use_scale=False, rngs=rngs)
        self.layers = shape.layers
        for layer in range(shape.layers):
            setattr(self, f"block_{layer}", Block(shape, rngs))
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.head = nnx.Linear(shape.width, shape.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int32[Array, "n length"]) -> Float[Array, "n length vocabulary"]:
        x = self.embed_norm(self.embed(tokens))
        for layer in range(self.layers):
            x = getattr(self, f"block_{layer}")(x)
        return self.head(self.norm(x))


def rotated(x: Float[Array, "n length heads head_dim"]) -> Float[Array, "n length heads head_dim"]:
    """Each pair of entries turned by an angle that grows with the place: products then tell distances."""
    length, pairs = x.shape[1], x.shape[3] // 2
    frequency = ROTARY_BASE ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    cosine, sine = (turn(angle)[None, :, None] for turn in (jnp.cos, jnp.sin))
    left, right = x[..., :pairs], x[..., pairs:]
    return jnp.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=-1)


def build_gpt(shape: GPTShape) -> Model:
    """The network as pure functions."""
    abstract = nnx.eval_shape(lambda: GPT(shape, nnx.Rngs(0)))
    graph, _ = nnx.split(abstract, nnx.Param)

    def init(key: jax.Array):
        _, params = nnx.split(GPT(shape, nnx.Rngs(key)), nnx.Param)
        return nnx.to_pure_dict(params), {}

    def apply(params, stats, tokens, train, observe=False):
        del train, observe
        return nnx.merge(graph, nnx.State(params))(tokens), stats, {}

    return Model("gpt", init, apply)
