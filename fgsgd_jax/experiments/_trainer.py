"""The training itself: pure functions of one state, compiled once, whatever calls them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

import fgsgd_jax as fg

from ._devices import Devices
from ._errors import UsageError
from ._models._initializers import BN_MOMENTUM
from ._models._model import Stats
from ._paths import by_path
from ._state import Figures, Glance, Totals, TrainState, Zeta
from ._task import make_task
from ._tasks import AnyConfig

# What the run's seed is folded with, so that each draws from a stream of its own.
WEIGHTS, MANIFOLDS, ORDER, AUGMENTATION = range(4)

# Steps that one call runs on an accelerator: enough to hide the call, few enough for a lively progress bar.
STEPS_PER_CALL = 25


class Trainer:
    """One network, one set of data and one optimizer, compiled.

    States of different seeds, whose plans differ, run through the same compiled program.
    """

    def __init__(self, config: AnyConfig, data: Any):
        """Build the network and the optimizer; each function is compiled when it is first called.

        Args:
            config: the training's options, of images or text.
            data: what the options' own `load` gave.

        Raises:
            UsageError: the options do not fit the data or the network.
        """
        self.devices = Devices()
        self.task = make_task(config, data, self.devices)
        if config.batch_size % len(self.devices):
            raise UsageError(
                f"--batch-size {config.batch_size} cannot be shared out over {len(self.devices)} devices; use a "
                "multiple of that"
            )
        self.config = config
        self.data = data
        self.steps_per_epoch, self.total_steps = self.task.steps_per_epoch, self.task.total_steps
        self.train_data, self.test_data = self.task.train_data, self.task.test_data

        self._model = self.task.model
        self._shapes, _ = jax.eval_shape(self._model.init, jax.random.key(0))
        self._unit_rate = self.task.unit_rate
        self._plans: dict[int, fg.Plan | None] = {}
        plan = self.plan_of(config.seed)
        self._observes = plan is not None and self.task.observes
        # The number of each parameter's groups, which is the same for every seed.
        collections = {} if plan is None else plan.collections
        self._groups = {path: np.unique(collection.group).size for path, collection in collections.items()}

        # A convolution inside a loop runs 14 times slower on CPU (measured): there, one step a call.
        self._loops = jax.default_backend() != "cpu"
        self.steps_per_call = STEPS_PER_CALL if self._loops else 1
        # Drawing weights is slow to compile and quick to run.
        hasty = None if self._loops else {"xla_backend_optimization_level": 1}
        self._init = jax.jit(self._model.init, compiler_options=hasty)
        self._order = jax.jit(self._epoch_order, compiler_options=hasty)
        self._step = jax.jit(self._one_step, donate_argnums=0)
        self._steps = jax.jit(self._many_steps, donate_argnums=0)
        self._norms = jax.jit(_norms)
        self._batch_statistics = jax.jit(self._statistics_of)
        self._mean = jax.jit(_mean)
        self._measured_on = self.devices.whole(
            [(jnp.int32(n), jnp.asarray(each)) for n, each in enumerate(self.task.statistics_rows)]
        )
        # Copies, since the step that follows gives the buffers away.
        self._copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self._test_batch = jax.jit(self._count_errors)

    def plan_of(self, seed: int) -> fg.Plan | None:
        """The plan of this seed; `None` for the baseline."""
        if seed not in self._plans:
            self._plans[seed] = self.task.plan(self._shapes, seed)
        return self._plans[seed]

    def start(self, seed: int, lr: float | None = None) -> TrainState:
        """The state before the first step; the learning rate is that of the options where left out."""
        rate = jnp.float32(self.config.rate if lr is None else lr)
        key, plan = jax.random.key(seed), self.plan_of(seed)
        params, stats = self._init(jax.random.fold_in(key, WEIGHTS))
        if plan is not None:
            params = self.task.begin(jax.random.fold_in(key, MANIFOLDS), params, plan)
        opt_state = self._optimizer(rate, plan).init(params)
        zeta = {path: Zeta(jnp.float32(0), jnp.float32(0), jnp.float32(0)) for path in self._groups}
        totals = Totals(jnp.int32(0), jnp.int32(0), jnp.float32(0), zeta)
        state = TrainState(jnp.int32(0), jnp.uint32(seed), rate, params, stats, opt_state, totals)
        # Copied, since steps give their state's buffers away and the optimizer's may be shared with the plan. Placed,
        # since restored states are: to JAX, an array that is not would be reason to compile again.
        return self.devices.whole(self._copied(state))

    def epochs_at(self, step: int) -> int:
        """How many epochs have ended by this step. The last may be shorter."""
        return step // self.steps_per_epoch + (step == self.total_steps and step % self.steps_per_epoch > 0)

    def order(self, state: TrainState) -> Int32[Array, " n"]:
        """The training examples of the epoch that the state is in, one batch after the other."""
        return self._order(state.seed, state.step)

    def advance(self, state: TrainState, order: Int32[Array, " n"], count: int) -> TrainState:
        """So many steps on, all within one epoch. The state's buffers are given away."""
        if self._loops:
            return self._steps(state, order, self.train_data, count)
        for _ in range(count):
            state = self._step(state, order, self.train_data)
        return state

    def mark(self, state: TrainState) -> Array:
        """Something small to wait for, that is ready when the state is, and outlives it."""
        return self._copied(state.step)

    def glance(self, state: TrainState, plan: fg.Plan | None) -> Glance:
        """What there is to report of a state, without waiting for the device."""
        # Processes look at different times, so none may need the others for it.
        own = self.devices.own(state)
        step, totals = self._copied((own.step, own.totals))
        if plan is None:
            return Glance(step, totals, {})
        return Glance(step, totals, fg.violation(own.params, plan, fg.radii(own.opt_state)))

    def figures(self, glance: Glance) -> Figures:
        """The epoch so far in a few numbers; waits until they are there."""
        glance = jax.device_get(glance)
        count = glance.totals.predictions
        loss, error = float(glance.totals.loss / count), float(100 * glance.totals.wrong / count)
        if not self._groups:
            return Figures(loss, error)
        zeta, steps = glance.totals.zeta, self._steps_of(glance.totals)
        touched = sum(zeta[path].share * groups for path, groups in self._groups.items())
        return Figures(
            loss,
            error,
            # Euclidean members have no violation; a scheme may have no others.
            violation=float(max(glance.violation.values(), default=0)),
            zeta_share=float(touched / (steps * sum(self._groups.values()))),
            grad_norm=float(max(each.grad_norm for each in zeta.values())),
            step_ratio=float(max(each.step_ratio for each in zeta.values())),
        )

    def averages(self, state: TrainState) -> Stats:
        """Batch normalization's statistics at these very weights, for evaluation: of a few batches of training images,
        augmented as in training, the same ones at every time.

        The running averages of the training describe the weights of the last ten steps and more. Behind large steps
        that is another network: after 28 steps on digits at the rate 0.1 the test error was 20.5 % by them and 6.4 %
        by this on manifolds, 42.9 % and 5.8 % without.
        """
        if not jax.tree.leaves(state.stats):
            return state.stats
        return self._mean(
            [self._batch_statistics(state.params, state.stats, self.train_data, *batch) for batch in self._measured_on]
        )

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """Loss and error (in percent) on the test, every example counted exactly once."""
        count, stats = self.task.tests, self.averages(state)
        batches = [
            self._test_batch(state.params, stats, self.test_data, first)
            for first in range(0, count, self.config.batch_size)
        ]
        losses, wrong = zip(*jax.device_get(batches), strict=True)
        count *= self.task.predictions
        return float(np.sum(losses, dtype=np.float64)) / count, 100 * int(np.sum(wrong)) / count

    def report(self, state: TrainState, plan: fg.Plan | None) -> dict[str, Any]:
        """The log's line for the epoch that the state has come to the end of. Errors are in percent."""
        loss, error = self.evaluate(state)
        return {"test": {"loss": loss, "error": error}} | self.report_training(state, plan)

    def report_training(self, state: TrainState, plan: fg.Plan | None) -> dict[str, Any]:
        """The same without a look at the test."""
        glance = jax.device_get(self.glance(state, plan))
        figures = self.figures(glance)._asdict()
        step = int(glance.step)
        record = {
            "epoch": self.epochs_at(step),
            "step": step,
            "lr": float(np.asarray(state.lr * self._unit_rate(step - 1))),
            "train": {"loss": figures.pop("loss"), "error": figures.pop("error")},
            "norms": {path: float(norm) for path, norm in jax.device_get(self._norms(state.params)).items()},
        }
        if plan is None:
            return record
        by_parameter = {
            path: {
                "violation": float(glance.violation.get(path, 0)),
                "zeta_share": float(zeta.share / self._steps_of(glance.totals)),
                "grad_norm": float(zeta.grad_norm),
                "step_ratio": float(zeta.step_ratio),
            }
            for path, zeta in glance.totals.zeta.items()
        }
        if self._observes:
            for path, scales in self._scales(state, plan).items():
                by_parameter[path] |= scales
        return record | figures | {"by_parameter": by_parameter}

    def _scales(self, state: TrainState, plan: fg.Plan) -> dict[str, dict[str, float]]:
        """ℜ and λ = γ/ℜ of every layer: the medians over its constrained slices, and how many kept their scale."""
        radii, figures = jax.device_get((fg.radii(state.opt_state), fg.metrics(state.opt_state)))
        scales = {}
        for path, collection in plan.collections.items():
            free = np.array([isinstance(manifold, fg.Euclidean) for manifold in collection.manifolds])
            if (bound := ~free[collection.member]).any():
                radius = radii[path][bound]
                gamma = np.broadcast_to(collection.gamma, bound.shape)[bound]
                scales[path] = {
                    "radius": float(np.median(radius)),
                    "lambda": float(np.median(gamma / radius)),
                    "unfed": int(figures[path].unfed),
                }
        return scales

    def _optimizer(self, lr: Array, plan: fg.Plan | None) -> optax.GradientTransformationExtraArgs:
        """The optimizer at this rate. What it compiles to depends on no seed of the plan."""
        return self.task.optimizer(lambda count: lr * self._unit_rate(count), plan)

    def _steps_of(self, totals: Totals) -> float:
        """The steps that went into the totals."""
        return float(totals.predictions) / (self.config.batch_size * self.task.predictions)

    # What is compiled.

    def _epoch_order(self, seed: Array, step: Array) -> Int32[Array, " n"]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ORDER), step // self.steps_per_epoch)
        return self.task.order(key)

    def _one_step(self, state: TrainState, order: Array, data: Any) -> TrainState:
        batch = self.config.batch_size
        place = state.step % self.steps_per_epoch
        rows = lax.dynamic_slice(order, (place * batch,), (batch,))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), AUGMENTATION), state.step)
        inputs, labels = self.task.train_batch(data, rows, key)

        def objective(params):
            logits, stats, moments = self._model.apply(params, state.stats, inputs, True, self._observes)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, stats, moments)

        (loss, (logits, stats, moments)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        observed = {"feature_moments": moments} if self._observes else {}
        tx = self._optimizer(state.lr, self.plan_of(self.config.seed))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **observed)
        params: Any = optax.apply_updates(state.params, updates)

        before = jax.tree.map(lambda total: jnp.where(place == 0, jnp.zeros_like(total), total), state.totals)
        totals = Totals(
            predictions=before.predictions + labels.size,
            wrong=before.wrong + jnp.sum(_missed(logits, labels), dtype=jnp.int32),
            loss=before.loss + loss * labels.size,
            zeta=self._add_zeta(before.zeta, opt_state),
        )
        return state._replace(step=state.step + 1, params=params, stats=stats, opt_state=opt_state, totals=totals)

    def _many_steps(self, state: TrainState, order: Array, data: Any, count: Array) -> TrainState:
        # The count is traced: one program for every number of steps, and each step the same in all of them.
        return lax.fori_loop(0, count, lambda _, state: self._one_step(state, order, data), state)

    def _count_errors(self, params: Any, stats: Any, data: Any, first: Array) -> tuple[Array, Array]:
        rows = first + jnp.arange(self.config.batch_size)
        real = rows < self.task.tests
        inputs, labels = self.task.test_batch(data, jnp.minimum(rows, self.task.tests - 1))
        logits, *_ = self._model.apply(params, stats, inputs, False, False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        real = jnp.broadcast_to(real.reshape(-1, *[1] * (labels.ndim - 1)), labels.shape)
        return jnp.sum(losses, where=real), jnp.sum(_missed(logits, labels), where=real, dtype=jnp.int32)

    def _statistics_of(self, params: Any, stats: Stats, data: Any, number: Array, rows: Array) -> Stats:
        key = jax.random.fold_in(jax.random.key(AUGMENTATION), number)
        inputs, _ = self.task.train_batch(data, rows, key)
        # Averages of nothing but this batch: from zero, a step moves them by the same share of it everywhere.
        nothing = jax.tree.map(jnp.zeros_like, stats)
        _, moved, _ = self._model.apply(params, nothing, inputs, True, False)
        return jax.tree.map(lambda each: each / (1 - BN_MOMENTUM), moved)

    def _add_zeta(self, totals: dict[str, Zeta], opt_state: Any) -> dict[str, Zeta]:
        if not self._groups:
            return {}
        return {
            path: Zeta(
                totals[path].share + step.zeta_share,
                jnp.maximum(totals[path].grad_norm, step.grad_norm),
                jnp.maximum(totals[path].step_ratio, step.step_ratio),
            )
            for path, step in fg.metrics(opt_state).items()
        }


def _missed(logits: Float[Array, "*n classes"], labels: Int32[Array, "*n"]) -> Bool[Array, "*n"]:
    return lax.argmax(logits, logits.ndim - 1, jnp.int32) != labels


def _mean(trees: list[Stats]) -> Stats:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def _norms(params: Any) -> dict[str, Array]:
    """Every weight's Frobenius norm, by its "/"-joined path; biases and batch normalization's scales are no weights."""
    return {path: jnp.sqrt(jnp.sum(jnp.square(leaf))) for path, leaf in by_path(params).items() if leaf.ndim > 1}
