"""What the bounds say of a network in training: norms, certificates, operator norms and generalization bounds."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

import fgsgd_jax as fg
from fgsgd_jax.bounds import Certificate, Chain, ConvNorms, GeneralizationBounds, LayerNorms, Norms, Sample, Sum

from ._device_data import DeviceSplit, normalize
from ._models import Model
from ._models._initializers import BN_EPSILON
from ._paths import by_path
from ._state import TrainState
from ._trainer import Trainer

# A maximum over windows of 3×3 at strides of 2 sees every pixel up to four times.
MAX_POOL = 2.0

# The forms of the generalization bounds, as in `GeneralizationBounds`.
FORMS = {"layers": "Table 1, layers", "groups": "Table 1, groups", "papers": "own papers"}
PAPERS = {"neyshabur_2015": "Neyshabur 2015", "bartlett_2017": "Bartlett 2017", "neyshabur_2018": "Neyshabur 2018"}


class Measures(NamedTuple):
    """Everything that is reported of one state."""

    norms: dict[str, LayerNorms]
    operators: dict[str, ConvNorms]
    """with what batch normalization in evaluation makes of a convolution"""
    certificate: Certificate
    log_lipschitz: float | None
    """of the scores by the normalized image; None for networks with gates, which have no such constant"""
    bounds: GeneralizationBounds
    train_error: float
    """in percent, of the images as they are: without augmentation, in evaluation"""
    test_error: float

    @property
    def gap(self) -> float:
        """The measured generalization gap: test error less training error, in points of percent."""
        return self.test_error - self.train_error

    def record(self) -> dict[str, Any]:
        """The figures without those of single layers, for the log. Logarithms are natural."""
        statements = self.certificate.statements.values()
        return {
            "gap": self.gap,
            "train_error": self.train_error,
            "test_error": self.test_error,
            "log_lipschitz": self.log_lipschitz,
            "groups": self.certificate.groups,
            "certified": {
                name: sum(int(getattr(norms, name).holds.sum()) for norms in statements) for name in Norms._fields
            },
            "margin": self.bounds.margin,
            "margin_loss": self.bounds.margin_loss,
            "log": {form: getattr(self.bounds, form)._asdict() for form in FORMS},
        }


class Measurer:
    """Measures the states of one training; compiled once for all of them."""

    def __init__(self, trainer: Trainer, reference: Any):
        """Find the convolutions.

        Args:
            trainer: the training.
            reference: the parameters before it, from which the bounds of Bartlett et al. measure the distance.
        """
        self._trainer = trainer
        # A copy: the first step gives these buffers away.
        self._reference = jax.tree.map(lambda leaf: np.array(leaf), reference)
        self._model = trainer.task.model
        self._geometries = geometries(self._model, trainer.data.train.images.shape[1:])
        self._scores = jax.jit(self._scores_of)

    def __call__(self, state: TrainState, plan: fg.Plan | None) -> Measures:
        params, trainer = state.params, self._trainer
        radii = None if plan is None else fg.radii(state.opt_state)
        plan = fg.plan(params, [("*", None)]) if plan is None else plan
        images, scores = trainer.data.train.images, self._all_scores(state)
        labels = trainer.data.train.labels
        inputs = (images - np.asarray(trainer.train_data.mean)) / np.asarray(trainer.train_data.std)
        scales = _scales(params, trainer.averages(state), self._geometries)
        bounds = fg.generalization_bounds(
            params,
            plan,
            Sample.of(inputs, scores, labels),
            geometries=self._geometries,
            scales=scales,
            reference=self._reference,
            radii=radii,
        )
        operators = jax.device_get(fg.conv_norms(params, self._geometries, scales))
        network = structure(self._geometries, params)
        norms = fg.norms(params, plan, radii)
        # In the order of calls: the parameters' own is alphabetical.
        order = [*self._geometries, *(path for path in norms if path not in self._geometries)]
        _, test_error = trainer.evaluate(state)
        return Measures(
            norms={path: jax.device_get(norms[path]) for path in order},
            operators={path: operators[path] for path in order if path in operators},
            certificate=fg.certify(params, plan),
            log_lipschitz=None if network is None else fg.log_lipschitz(network, operators),
            bounds=bounds,
            train_error=100 * float(np.mean(scores.argmax(axis=1) != labels)),
            test_error=test_error,
        )

    def _all_scores(self, state: TrainState) -> np.ndarray:
        count, batch = len(self._trainer.data.train), self._trainer.config.batch_size
        stats = self._trainer.averages(state)
        scores = [
            self._scores(state.params, stats, self._trainer.train_data, first) for first in range(0, count, batch)
        ]
        return np.concatenate(jax.device_get(scores))[:count]

    def _scores_of(self, params: Any, stats: Any, data: DeviceSplit, first: Any) -> jax.Array:
        # The last batch is filled up with the last image, so that one program serves them all.
        rows = jnp.minimum(first + jnp.arange(self._trainer.config.batch_size), len(data.labels) - 1)
        logits, *_ = self._model.apply(params, stats, normalize(data.images[rows], data), False, False)
        return logits


def geometries(model: Model, shape: tuple[int, ...]) -> dict[str, fg.ConvGeometry]:
    """The geometry of every convolution by the path of its kernel, for images of this shape, in the order of calls."""
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    traced = jax.make_jaxpr(lambda params, stats, images: model.apply(params, stats, images, False, False)[0])
    jaxpr = traced(params, stats, images).jaxpr
    found: dict[str, fg.ConvGeometry] = {}
    _collect(jaxpr, dict(zip(jaxpr.invars, by_path(params), strict=False)), found)
    return found


def _collect(jaxpr: Any, names: dict[Any, str], found: dict[str, fg.ConvGeometry]) -> None:
    """Notes the convolutions of a program, whose variables `names` knows by the parameter's path."""
    for equation in jaxpr.eqns:
        known = [None if isinstance(variable, Literal) else names.get(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            _collect(
                inner,
                {variable: path for variable, path in zip(inner.invars, known, strict=False) if path is not None},
                found,
            )
        elif equation.primitive.name == "conv_general_dilated" and known[1] is not None:
            options = equation.params
            found[known[1]] = fg.ConvGeometry(
                size=tuple(equation.invars[0].aval.shape[axis] for axis in options["dimension_numbers"].lhs_spec[2:]),
                strides=tuple(options["window_strides"]),
                padding=tuple(map(tuple, options["padding"])),
                groups=options["feature_group_count"],
                dilation=tuple(options["rhs_dilation"]),
            )


def structure(found: dict[str, fg.ConvGeometry], params: Any) -> Chain | None:
    """How the networks of `_models` are put together; None for those with squeeze-and-excitation gates."""
    shapes = {path: leaf.shape for path, leaf in by_path(params).items()}
    if any("/squeeze/" in path for path in shapes):
        return None
    parts: list[Any] = []
    blocks: dict[str, list[str]] = {}
    for path in found:
        if (block := re.match(r"stage_\d+/block_\d+/", path)) is None:
            parts.append(path)
            if found[path].strides != (1, 1) and path == "stem/kernel":
                parts.append(MAX_POOL)
        else:
            blocks.setdefault(block.group(), []).append(path)
    for paths in blocks.values():
        shortcut = [path for path in paths if "/shortcut_conv/" in path]
        # Shortcuts without parameters choose pixels and add channels of zeros.
        parts.append(Sum(shortcut[0] if shortcut else 1, Chain(*(path for path in paths if path not in shortcut))))
    last = list(found)[-1]
    height, width = found[last].output_size(shapes[last][:2])
    return Chain(*parts, (height * width) ** -0.5, "head/kernel")


def _scales(params: Any, stats: Any, found: dict[str, fg.ConvGeometry]) -> dict[str, jax.Array]:
    """The factor of the batch normalization behind each convolution, in evaluation."""
    scales = {}
    for path in found:
        *above, layer, _ = path.split("/")
        name = layer.replace("conv", "norm") if "conv" in layer else f"{layer}_norm"
        norm, moments = _at(params, [*above, name]), _at(stats, [*above, name])
        if norm is not None and moments is not None:
            scales[path] = norm["scale"] / jnp.sqrt(moments["var"] + BN_EPSILON)
    return scales


def _at(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        if tree is None or key not in tree:
            return None
        tree = tree[key]
    return tree


def log10(natural: float | None) -> float:
    """A natural logarithm as a decimal one, for people; NaN for none."""
    return math.nan if natural is None else natural / math.log(10)
