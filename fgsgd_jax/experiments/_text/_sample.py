from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._models import Model
from ._corpus import Bytes


def continued(
    model: Model, params: Any, prompt: Bytes, count: int, context: int, seed: int = 0, temperature: float = 0.8
) -> str:
    """What a model writes behind a prompt.

    Args:
        model: from `build_gpt`.
        params: its weights.
        prompt: bytes, of which the last `context` are seen.
        count: how many bytes to write.
        context: how many bytes the model sees at once.
        seed: of the draws.
        temperature: below 1, likely bytes are drawn more often than the model says.

    Returns:
        The text without the prompt; what cannot be shown is �.
    """
    prompt = np.asarray(prompt[-context:], np.int32)

    def write(params: Any, key: jax.Array) -> jax.Array:
        # What is to come lies behind the window's end, where causal attention does not look.
        text = jnp.zeros(context + count, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt))

        def one(place: jax.Array, text: jax.Array) -> jax.Array:
            first = jnp.maximum(place - context, 0)
            window = jax.lax.dynamic_slice(text, (first,), (context,))
            logits, _, _ = model.apply(params, {}, window[None], False, False)
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits[0, place - first - 1] / temperature)
            return text.at[place].set(drawn.astype(jnp.int32))

        return jax.lax.fori_loop(len(prompt), len(prompt) + count, one, text)

    text = np.asarray(jax.jit(write)(params, jax.random.key(seed)))
    written = text[len(prompt) : len(prompt) + count].astype(np.uint8).tobytes().decode(errors="replace")
    # Among a model's bytes there may be those that command a terminal.
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in written)
