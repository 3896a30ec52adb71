"""Training steps on noise in the shape of CIFAR-10: what of them the update is, and observing the features."""

import jax
import jax.numpy as jnp
import numpy as np
from record import Record
from timing import medians, ratio, side_by_side

from fgsgd_jax.experiments._config import TrainConfig
from fgsgd_jax.experiments._data import ImageSet, Split
from fgsgd_jax.experiments._trainer import Trainer

PIO = {"scheme": "pio:sp+ob+st"}
MODELS = {
    "ResNet-110": ("resnet110", {"sgd": {"scheme": "euc"}, "fgsgd": PIO}),
    "ResNet-20": ("resnet20", {"sgd": {"scheme": "euc"}, "fgsgd": PIO, "fgsgd with λ": PIO | {"lambda_": "epoch"}}),
}
BATCH = 128
# To free what a step leaves takes longer than an update: seven times as long with ResNet-20.
PAUSE = 0.5


def images(count, size=32):
    """What a step costs does not depend on what is seen."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    split = Split(pixels, (np.arange(count) % 10).astype(np.int32))
    return ImageSet("noise", split, split, tuple(map(str, range(10))))


class Arm:
    """A training that goes on by a few steps at every call."""

    def __init__(self, config: TrainConfig, data: ImageSet):
        self.trainer = Trainer(config, data)
        self.steps = self.trainer.steps_per_call
        self.state = self.trainer.start(0)
        self.order = self.trainer.order(self.state)

    def __call__(self):
        # From the epoch's beginning every time: an epoch may be shorter than all turns together.
        self.state = self.trainer.advance(
            self.state._replace(step=jnp.zeros_like(self.state.step)), self.order, self.steps
        )
        return self.state.step

    def update(self):
        """The compiled update of its optimizer alone, on gradients at hand, as a program without arguments."""
        state = self.trainer.start(0)
        tx = self.trainer._optimizer(jnp.float32(0.1), self.trainer.plan_of(0))
        keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params)))
        keys = jax.tree.unflatten(jax.tree.structure(state.params), list(keys))
        grads = jax.tree.map(lambda key, x: 0.01 * jax.random.normal(key, x.shape), keys, state.params)
        compiled = jax.jit(tx.update).lower(grads, state.opt_state, state.params).compile()
        return lambda: compiled(grads, state.opt_state, state.params)


def measure(record: Record, models=None, batch: int = BATCH, size: int = 32) -> None:
    """A row for every optimizer's step, and one for the update alone."""
    repeats, seconds = (3, 6.0) if record.quick else (9, 12.0)
    if record.quick and models is None:
        record.left_out("all", "all", "a quick run: to compile a training step takes a minute")
        return
    for case, (model, arms) in (MODELS if models is None else models).items():
        if record.has_time(case):
            with record.case(case):
                _measure(record, case, model, arms, batch, size, repeats, seconds)


def _measure(record, case, model, arms, batch, size, repeats, seconds):
    data = images(32 * batch, size)
    made = {
        name: Arm(TrainConfig(model=model, batch_size=batch, augment="none", **settings), data)
        for name, settings in arms.items()
    }
    found = side_by_side(made | {"update alone": made["fgsgd"].update()}, repeats, seconds, pause=PAUSE)
    found = {
        name: [time / (made[name].steps if name in made else 1) for time in times] for name, times in found.items()
    }
    for name, median in medians(found).items():
        figures = {"over sgd": ratio(found, name, "sgd"), "of a step": ratio(found, name, "fgsgd")}
        record.row(case, name, ("flax",), median=median, **figures, batch=batch, seconds=found[name])
