from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32, UInt8

import fgsgd_jax as fg

from .._devices import Devices
from .._errors import UsageError
from .._schedules import schedule, warmed_up
from ._config import TextConfig
from ._corpus import TextSet
from ._gpt import GPTShape, build_gpt
from ._optimizers import make_text_optimizer
from ._rules import text_rules
from ._sample import continued

VOCABULARY = 256

# Bytes of the test that a model goes on from, and bytes that it writes.
PROMPT, WRITTEN = 64, 400


class DeviceText(NamedTuple):
    """Text on the device, and where its passages begin."""

    tokens: UInt8[Array, " n"]
    starts: Int32[Array, " passages"]


class TextTask:
    """Passages of text, of which every next byte is to be told."""

    observes = False
    # There is no batch normalization.
    statistics_rows = np.zeros((0, 0), np.int32)

    def __init__(self, config: TextConfig, data: TextSet, devices: Devices):
        """Put the text on the devices and build the network.

        Args:
            config: the options, checked.
            data: what `load_text` gave for them.
            devices: which train.
        """
        self._config, self._devices, self.data = config.check(), devices, data
        self.steps_per_epoch = min(config.report_every, config.steps)
        self.total_steps = config.steps
        self.predictions = config.context
        train, test = (np.concatenate(part) for part in (data.train, data.test))
        passages = (len(test) - 1) // config.context
        if passages < 1 or len(train) <= config.context:
            raise UsageError(
                f"data {data.name!r} has {len(train):,} bytes to train on and {len(test):,} to test on, too few for "
                f"passages of --context {config.context}"
            )
        # Spread over all of the text, each a passage of its own.
        count = min(passages, -(-config.test_bytes // config.context))
        starts = config.context * (np.arange(count) * passages // count)
        self.tests = count
        self._last_start = len(train) - config.context - 1
        self.train_data = devices.whole(DeviceText(_padded(train), jnp.zeros(0, jnp.int32)))
        self.test_data = devices.whole(DeviceText(_padded(test), jnp.asarray(starts, jnp.int32)))
        self.shape = GPTShape(VOCABULARY, config.layers, config.width, config.heads)
        self.model = build_gpt(self.shape)
        self.unit_rate = warmed_up(schedule(config.schedule, 1.0, config.steps), config.warmup)

    def plan(self, shapes: Any, seed: int) -> fg.Plan | None:
        rules = text_rules(self._config.scheme, self.shape, self._config.retraction)
        if rules is None:
            return None
        try:
            return fg.plan(shapes, rules, seed=seed)
        except ValueError as error:
            raise UsageError(
                f"--scheme {self._config.scheme} does not fit --width {self.shape.width}: {error}"
            ) from error

    def begin(self, key: jax.Array, params: Any, plan: fg.Plan) -> Any:
        match self._config.start:
            case "uniform":
                return fg.initialize(key, params, plan)
            case "nearest":
                return fg.nearest(params, plan)
            case "free":
                return params

    def optimizer(self, rate: optax.Schedule, plan: fg.Plan | None) -> optax.GradientTransformationExtraArgs:
        return make_text_optimizer(self._config, rate, lambda count: self._config.free_lr * self.unit_rate(count), plan)

    def order(self, key: jax.Array) -> Int32[Array, " n"]:
        count = self.steps_per_epoch * self._config.batch_size
        return jax.random.randint(key, (count,), 0, self._last_start + 1, jnp.int32)

    def train_batch(self, data: DeviceText, rows: Array, key: jax.Array) -> tuple[Array, Array]:
        del key
        return self._passages(data.tokens, rows)

    def test_batch(self, data: DeviceText, rows: Array) -> tuple[Array, Array]:
        return self._passages(data.tokens, data.starts[rows])

    def sample(self, params: Any) -> str:
        """The beginning of the test, and what the model writes behind it."""
        prompt = self.data.test[0][:PROMPT]
        return prompt.tobytes().decode(errors="replace") + continued(
            self.model, params, prompt, WRITTEN, self.predictions
        )

    def _passages(self, tokens: Array, starts: Array) -> tuple[Int32[Array, "n length"], Int32[Array, "n length"]]:
        places = starts[:, None] + jnp.arange(self.predictions + 1, dtype=jnp.int32)[None]
        passages = self._devices.shared(tokens[places].astype(jnp.int32))
        return passages[:, :-1], passages[:, 1:]


def _padded(text: np.ndarray) -> Array:
    """Text up to the next power of two, so that texts of like length have one program in JAX's cache of them."""
    return jnp.asarray(np.pad(text, (0, (1 << (len(text) - 1).bit_length()) - len(text))))
