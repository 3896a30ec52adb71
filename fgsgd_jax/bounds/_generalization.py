"""Bounds of the generalization error: of the paper's Table 1, and of the papers that they come from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ..groups import Collection, Plan, Radii, by_path
from ._conv_norms import Scales, conv_norms, scaled_kernel
from ._geometry import ConvGeometry
from ._norms import norms as norms_of
from ._operator_sums import OperatorSums, operator_sums
from ._unit_norms import Norms


class LogBounds(NamedTuple):
    """Natural logarithms of three bounds, up to the constants and logarithms that O and Õ hide."""

    neyshabur_2015: float
    bartlett_2017: float
    neyshabur_2018: float


class Sample(NamedTuple):
    """What the papers' bounds take from the training samples."""

    margins: Float[np.ndarray, " samples"]
    """score of the label less the best other score"""
    input_norms: Float[np.ndarray, " samples"]
    """Euclidean norms of the inputs, each as one vector"""

    @staticmethod
    def of(
        inputs: Float[Array | np.ndarray, "samples ..."],
        scores: Float[Array | np.ndarray, "samples classes"],
        labels: Integer[Array | np.ndarray, " samples"],
    ) -> "Sample":
        """From the network's inputs (as it sees them), its scores (logits) and the labels; join batches beforehand.

        Example:
          >>> import numpy as np
          >>> import fgsgd_jax as fg
          >>> scores, labels = np.array([[2.0, 0.5], [1.0, 3.0]]), np.array([0, 0])
          >>> fg.bounds.Sample.of(np.array([[3.0, 4.0], [0.0, 1.0]]), scores, labels)
          Sample(margins=array([ 1.5, -2. ]), input_norms=array([5., 1.]))
        """
        scores = np.array(scores, np.float64)
        inputs = np.asarray(inputs, np.float64)
        rows, labels = np.arange(len(scores)), np.asarray(labels)
        own = scores[rows, labels]
        scores[rows, labels] = -np.inf
        return Sample(own - scores.max(axis=1), np.sqrt(np.square(inputs).reshape(len(inputs), -1).sum(axis=1)))


class GeneralizationBounds(NamedTuple):
    """Logarithms of bounds of the generalization error: a share of wrong answers, so above 0 they say nothing."""

    layers: LogBounds
    """the paper's Table 1 with one group a layer"""
    groups: LogBounds
    """the paper's Table 1 with the products over groups"""
    papers: LogBounds | None
    """as in their own papers, at the margin below; None without a `Sample`; inf where the margin is not positive"""
    margin: float
    margin_loss: float
    """share of the samples with at most this margin: what `papers` is added to"""


def generalization_bounds(
    params: Any,
    plan: Plan,
    data: int | Sample,
    *,
    geometries: Mapping[str, ConvGeometry] | None = None,
    scales: Scales | None = None,
    reference: Any = None,
    delta: Literal["measured", "bound"] = "measured",
    radii: Radii | None = None,
    width: int | None = None,
    margin_share: float = 0.1,
    confidence: float = 0.05,
) -> GeneralizationBounds:
    """Three bounds of the generalization error, as in the paper's Table 1 and as in the papers that it cites.

    With δ_{g,l} the norms of group g of layer l as `norms` has them, L layers and N samples, Table 1 is

        Neyshabur 2015   2^L Π_l Π_g δ_F / √N
        Bartlett 2017    Π_l Π_g δ_2 / √N (Σ_l Π_g (δ_{2→1}/δ_2)^⅔)^(3/2)
        Neyshabur 2018   Π_l Π_g δ_2 / √N (L² ϖ Σ_l Π_g δ_F²/δ_2²)^½

    In their own papers the layers are matrices A_l that act on vectors, convolutions included: A_l is the operator with
    all positions, its spectral norm the certified one of `conv_norms`, M_l that of `reference`. With the margin γ,
    confidence 1 - ε, the inputs x, ‖X‖² = Σ‖x‖², and W and h the largest dimension and the largest output:

        Neyshabur 2015   2^(L-½) max‖x‖ Π ‖A_l‖_F / (γ √N)
        Bartlett 2017    ‖X‖ ln W / (γ N) Π ‖A_l‖_2 (Σ (‖A_l - M_l‖_{2→1}/‖A_l‖_2)^⅔)^(3/2) + (ln(1/ε)/N)^½
        Neyshabur 2018   ((max‖x‖² L² h ln(Lh) Π ‖A_l‖_2² Σ ‖A_l‖_F²/‖A_l‖_2² + ln(LN/ε)) / (γ² N))^½

    They are theorems (up to constants) for chains of such layers and ReLUs, without biases; for other networks they are
    figures of the same form. They are astronomically large for deep networks, hence in logarithms, and such measures
    often fail to predict which network generalizes better.

    Args:
      params: the parameters.
      plan: the plan of these parameters.
      data: the number of training samples, or what `Sample.of` takes from them for the papers' own bounds.
      geometries: of the convolutions, by path, for the papers' own bounds.
      scales: factors on the outputs of layers, as in `conv_norms`; only for the papers' own bounds.
      reference: parameters M fixed before training, such as the initialization, in the structure of `params`; None for
        zero.
      delta: whether Table 1 takes the measured norms or their bounds on the manifolds (inf for free weights).
      radii: of the manifolds, as in `norms`.
      width: ϖ of Table 1; None for the most inputs or outputs (channels) of any layer.
      margin_share: γ is the margin that this share of the samples does not exceed.
      confidence: ε, the probability with which the papers' bounds may fail.

    Returns:
      The bounds and the margin.

    Raises:
      ValueError: for an invalid number, or a layer without a geometry.

    References:
      Neyshabur, Tomioka & Srebro, Norm-Based Capacity Control in Neural Networks, 2015, theorem 1 (p = q = 2).
      Bartlett, Foster & Telgarsky, Spectrally-normalized margin bounds for neural networks, 2017, theorem 1.1.
      Neyshabur, Bhojanapalli & Srebro, A PAC-Bayesian Approach to Spectrally-Normalized Margin Bounds, 2018, theorem 1.
      Ozay, Fine-grained Optimization of Deep Neural Networks, 2019, Table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"a": 2 * jnp.eye(3), "b": jnp.eye(3)}
      >>> plan = fg.plan(params, [("*", None)])
      >>> round(fg.generalization_bounds(params, plan, 100).layers.neyshabur_2015, 3)  # log(2² · 2√3 · √3 / 10)
      0.875
    """
    samples = data if isinstance(data, int) else len(data.margins)
    for name, value, least, most in (
        ("samples", samples, 1, math.inf),
        ("width", width if width is not None else 1, 1, math.inf),
        ("margin_share", margin_share, 0.0, 1.0),
        ("confidence", confidence, 1e-300, 1.0),
    ):
        if not least <= value <= most:
            raise ValueError(f"generalization_bounds: {name} is {value}, it must lie between {least} and {most}")
    leaves = by_path(params)
    found = norms_of(params, plan, radii)
    widest = width or max((max(leaves[path].shape[-2:]) for path in found), default=1)
    pairs = [(plan[path], norms) for path, norms in found.items()]
    layers = table1([part for _, own in pairs for part in _layers(getattr(own.layer, delta))], samples, widest)
    groups = table1(
        [part for stack, own in pairs for part in _groups(getattr(own.groups, delta), stack)], samples, widest
    )
    if isinstance(data, int):
        return GeneralizationBounds(layers, groups, None, math.nan, math.nan)
    margin = float(np.quantile(data.margins, margin_share, method="inverted_cdf"))
    loss = float(np.mean(data.margins <= margin))
    if not margin > 0:
        return GeneralizationBounds(layers, groups, LogBounds(math.inf, math.inf, math.inf), margin, loss)
    operators = _operators(params, geometries or {}, scales, reference)
    return GeneralizationBounds(layers, groups, of_papers(operators, data, margin, confidence), margin, loss)


def table1(norms: Sequence[Norms], samples: int, width: int) -> LogBounds:
    """Table 1, from the norms of the groups of each layer."""
    depth = len(norms)
    frobenius, spectral, two_to_one = (
        np.array([_log(getattr(layer, name)).sum() for layer in norms]) for name in Norms._fields
    )
    root = math.log(samples) / 2
    return LogBounds(
        neyshabur_2015=depth * math.log(2) + float(frobenius.sum()) - root,
        bartlett_2017=_log_complexity(spectral, two_to_one, 2 / 3) - root,
        neyshabur_2018=_log_complexity(spectral, frobenius, 2.0) - root + math.log(max(depth, 1)) + math.log(width) / 2,
    )


def _layers(norms: Norms) -> list[Norms]:
    """The norms of every layer of a stack, or of the one layer."""
    flat = (np.asarray(norm).ravel() for norm in norms)
    return [Norms(*values) for values in zip(*flat, strict=True)]


def _groups(norms: Norms, collection: Collection | None) -> list[Norms]:
    """The norms of the groups of every layer of a stack, or of the one layer."""
    if collection is None or not collection.layers:
        return [norms]
    # Their numbers run on from layer to layer.
    inner = collection.group.reshape(-1, math.prod(collection.view.grid[:2])).max(axis=1)[:-1] + 1
    parts = (np.split(np.asarray(norm), inner) for norm in norms)
    return [Norms(*values) for values in zip(*parts, strict=True)]


class Operator(NamedTuple):
    """What the papers' bounds take from a layer."""

    spectral: float
    sums: OperatorSums
    distance: float
    """2→1 norm of its difference to the reference"""


def of_papers(operators: Sequence[Operator], data: Sample, margin: float, confidence: float) -> LogBounds:
    """The bounds of the three papers, from the operators of the layers."""
    depth, samples = len(operators), len(data.margins)
    spectral = _log([operator.spectral for operator in operators])
    frobenius = _log([operator.sums.frobenius for operator in operators])
    distance = _log([operator.distance for operator in operators])
    longest, total = _log(np.max(data.input_norms)), _log(np.sqrt(np.sum(np.square(data.input_norms))))
    widest = max((max(operator.sums.inputs, operator.sums.outputs) for operator in operators), default=1)
    outputs = max((operator.sums.outputs for operator in operators), default=1)
    log_margin, log_samples = math.log(margin), math.log(samples)
    bartlett = total + _log(math.log(widest)) - log_margin - log_samples + _log_complexity(spectral, distance, 2 / 3)
    neyshabur = 2 * longest + 2 * math.log(max(depth, 1)) + math.log(outputs) + _log(math.log(max(depth, 1) * outputs))
    neyshabur = neyshabur + 2 * _log_complexity(spectral, frobenius, 2.0)
    rest = _log(math.log(max(depth, 1) * samples / confidence))
    return LogBounds(
        neyshabur_2015=float((depth - 0.5) * math.log(2) + longest + frobenius.sum() - log_margin - log_samples / 2),
        bartlett_2017=float(np.logaddexp(bartlett, (_log(-math.log(confidence)) - log_samples) / 2)),
        neyshabur_2018=float(np.logaddexp(neyshabur, rest) / 2 - log_margin - log_samples / 2),
    )


def _operators(
    params: Any, geometries: Mapping[str, ConvGeometry], scales: Scales | None, reference: Any
) -> list[Operator]:
    leaves, others = by_path(params), {} if reference is None else by_path(reference)
    operators = []
    for path, norms in conv_norms(params, geometries, scales).items():
        kernel = scaled_kernel(path, leaves[path], None if scales is None else scales.get(path))
        sums = operator_sums(kernel, geometries.get(path))
        moved = kernel
        if reference is not None:
            if path not in others or others[path].shape != leaves[path].shape:
                raise ValueError(f"the reference has no parameter {path!r} of shape {leaves[path].shape}: give it all")
            moved = kernel - jnp.asarray(others[path]).astype(kernel.dtype)
        distance = operator_sums(moved, geometries.get(path)).two_to_one
        operators.append(Operator(float(norms.certified), sums, distance))
    return operators


def _log(values: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, np.float64))


def _log_complexity(log_spectral: np.ndarray, log_norms: np.ndarray, power: float) -> float:
    """Logarithm of `Π σ_l (Σ (r_l/σ_l)^p)^(1/p)`.

    The product is taken into the sum, as `(Σ (r_l Π_{k≠l} σ_k)^p)^(1/p)`, which is defined also where a σ is zero.
    """
    alone = np.eye(len(log_spectral), dtype=bool)
    terms = np.where(alone, log_norms, log_spectral).sum(axis=-1)
    return float(np.logaddexp.reduce(power * terms, initial=-np.inf) / power)
