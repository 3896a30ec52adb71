"""What a Trainer has to know of what it trains, images or text: data on the device, a network, an optimizer."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

import fgsgd_jax as fg

from ._augment import Augmentation, augment, resolve
from ._config import TrainConfig
from ._data import ImageSet, balanced_order
from ._device_data import DeviceSplit, normalize, to_devices
from ._devices import Devices
from ._errors import UsageError
from ._models import Model, build
from ._optimizer import make_optimizer, make_plan
from ._schedules import schedule
from ._tasks import AnyConfig
from ._text import TextConfig, TextSet, TextTask

# Batches of training images, at most, that batch normalization's statistics are measured on before an evaluation. On
# digits two and seven gave errors that differ by a tenth of a point or two.
STATISTICS_BATCHES = 8


@runtime_checkable
class Task(Protocol):
    """A network to train on data. An epoch is what lies between two lines of the log."""

    data: Any
    model: Model
    train_data: Any
    test_data: Any
    steps_per_epoch: int
    total_steps: int
    predictions: int
    """of one example: 1 of an image, one for each byte of a passage"""
    tests: int
    """examples of the test"""
    unit_rate: optax.Schedule
    observes: bool
    """whether the optimizer needs the moments of features"""
    statistics_rows: Int32[np.ndarray, "batches n"]
    """the training examples to measure batch normalization's statistics on; none where there is none"""

    def plan(self, shapes: Any, seed: int) -> fg.Plan | None:
        """The plan of a seed; `None` where no weight is constrained."""
        ...

    def begin(self, key: jax.Array, params: Any, plan: fg.Plan) -> Any:
        """The first weights on their manifolds."""
        ...

    def optimizer(self, rate: optax.Schedule, plan: fg.Plan | None) -> optax.GradientTransformationExtraArgs:
        """The optimizer at this rate. What it compiles to depends on no seed of the plan."""
        ...

    def order(self, key: jax.Array) -> Int32[Array, " n"]:
        """The examples of one epoch, one batch after the other."""
        ...

    def train_batch(self, data: Any, rows: Int32[Array, " n"], key: jax.Array) -> tuple[Array, Array]:
        """What enters the network for these examples, and what should come out."""
        ...

    def test_batch(self, data: Any, rows: Int32[Array, " n"]) -> tuple[Array, Array]:
        """The same for examples of the test."""
        ...

    def sample(self, params: Any) -> str | None:
        """What a trained model makes, where that can be shown in words."""
        ...


class ImageTask:
    """Images and their classes."""

    predictions = 1

    def __init__(self, config: TrainConfig, data: ImageSet, devices: Devices):
        if len(data.train) < config.batch_size:
            raise UsageError(
                f"--batch-size {config.batch_size} is more than the {len(data.train)} training images of "
                f"{data.name!r}; use --batch-size {len(data.train)} or less"
            )
        self._config, self._devices, self.data = config, devices, data
        # The last, smaller batch of an epoch is left out: the next epoch's order has its images elsewhere.
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.train_data, self.test_data = to_devices(data, devices)
        self.tests = len(data.test)
        self.model = build(config.model, len(data.classes), data.channels)
        assert self.model.trace is not None, "a network for images has a trace"
        self._trace = self.model.trace(data.train.images.shape[1:3])
        # Every schedule is proportional to the rate that it starts from.
        self.unit_rate = schedule(config.schedule, 1.0, self.total_steps)
        self.observes = config.lambda_ != "off"
        self._augmentation: Augmentation = resolve(config.augment, config.data)
        count = min(STATISTICS_BATCHES, -(-len(data.train) // config.batch_size))
        # The last one is filled up from the beginning.
        rows = np.resize(balanced_order(data.train.labels, seed=0), (count, config.batch_size))
        self.statistics_rows = rows.astype(np.int32)

    def plan(self, shapes: Any, seed: int) -> fg.Plan | None:
        return make_plan(self._config, shapes, seed, self._trace)

    def begin(self, key: jax.Array, params: Any, plan: fg.Plan) -> Any:
        return fg.initialize(key, params, plan)

    def optimizer(self, rate: optax.Schedule, plan: fg.Plan | None) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(self._config, rate, plan, self.steps_per_epoch)

    def order(self, key: jax.Array) -> Int32[Array, " n"]:
        return jax.random.permutation(key, len(self.train_data.labels)).astype(jnp.int32)

    def train_batch(self, data: DeviceSplit, rows: Array, key: jax.Array) -> tuple[Array, Array]:
        images, labels = self._devices.shared((data.images[rows], data.labels[rows]))
        return normalize(augment(key, images, self._augmentation), data), labels

    def test_batch(self, data: DeviceSplit, rows: Array) -> tuple[Float[Array, "n _ _ _"], Int32[Array, " n"]]:
        images, labels = self._devices.shared((data.images[rows], data.labels[rows]))
        return normalize(images, data), labels

    def sample(self, params: Any) -> None:
        del params


def make_task(config: AnyConfig, data: Any, devices: Devices) -> Task:
    """The task that a config and its data make."""
    if isinstance(config, TextConfig):
        assert isinstance(data, TextSet)
        return TextTask(config, data, devices)
    return ImageTask(config, data, devices)
