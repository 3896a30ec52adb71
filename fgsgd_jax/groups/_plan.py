"""The plan: which matrix of which parameter lives on which manifold, in which group."""

import difflib
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..manifolds import UNSTATED, Euclidean, Manifold
from ._buckets import Bucket, buckets_of
from ._collection import Collection, Entry
from ._deal import Bits
from ._json import digest, entry_from_json, entry_to_json
from ._paths import Pattern, array_leaves, by_path, matches, unboxed
from ._schemes import Scheme
from ._trace import Trace
from ._views import View, default_view, doubt

_FORMAT = "fgsgd_jax plan 1"


class Plan:
    """The manifolds and groups of all parameters, by path. Made by `plan`; see there.

    Its structure and counts are static; `member`, `group` and `gamma` are data that transformations put into their
    states. `order` lists the constrained parameters as the trace met them, with None at normalization layers. Two
    plans are equal if everything in them is, the seed included.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones(6)}
      >>> plan = fg.plan(params, [("kernel", fg.Each(fg.Sphere())), ("*", None)])
      >>> plan
      Plan(1 of 2 parameters constrained, seed=0)
      >>> plan.mask()  # where weight decay belongs
      {'bias': True, 'kernel': False}
      >>> fg.Plan.from_json(plan.to_json()) == plan
      True
      >>> print(plan.difference(fg.plan(params, [("kernel", fg.Each(fg.Oblique())), ("*", None)])))
      kernel: manifolds [{'name': 'Sphere'}] here, [{'name': 'Oblique'}] there
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        seed: int,
        order: tuple[str | None, ...] = (),
        names: Any = None,
    ):
        self.entries = entries
        self.seed = seed
        self.order = order
        # The tree of the parameters with their paths for leaves.
        self._names = names

    def __getitem__(self, path: str) -> Collection | None:
        """The collection of the parameter at `path`; None if it is unconstrained."""
        if path not in self.entries:
            close = difflib.get_close_matches(path, self.entries, n=3, cutoff=0.0)
            raise KeyError(f"the plan has no parameter {path!r}; close to it are {close}")
        return self.entries[path].collection

    def __iter__(self) -> Iterator[str]:
        """The paths of all parameters, in the order of the tree."""
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @functools.cached_property
    def collections(self) -> dict[str, Collection]:
        """The parameters that have a collection, by path."""
        return {path: entry.collection for path, entry in self.entries.items() if entry.collection is not None}

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets of the collections. Static: the same for all seeds."""
        return buckets_of(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.difference(other) is None

    # Plans are equal by content, and hold arrays: a hash that agrees with that would read all of them at each look-up.
    __hash__ = None  # type: ignore[assignment]

    def difference(self, other: "Plan") -> str | None:
        """The first difference to another plan, in words; None if there is none."""
        for path in dict.fromkeys([*self.entries, *other.entries]):
            if path not in self.entries or path not in other.entries:
                return f"{path}: only {'there' if path not in self.entries else 'here'}"
            if found := _entry_difference(self.entries[path], other.entries[path]):
                return f"{path}: {found}"
        if self.seed != other.seed:
            return f"seed: {self.seed} here, {other.seed} there"
        if self.order != other.order:
            return f"order of the layers: {self.order} here, {other.order} there"
        return None

    def mask(self, params: Any = None) -> Any:
        """A tree of booleans, true where weight decay belongs: at the leaves that no manifold constrains.

        For NNX the tree has no variables, so that it fits what an `nnx.Optimizer` passes to `init` (variables) and to
        `update` (arrays). Optax also takes the method itself, `mask=plan.mask`.

        Args:
          params: the parameters, or a part of them; needed if the plan was read from JSON, which holds no tree.
        """
        return self._labelled(lambda path: not self._constrained(path), params)

    def labels(self, params: Any = None) -> Any:
        """A tree of `"manifold"` and `"euclidean"`, for `optax.partition`; `params` as in `mask`.

        `optax.partition` calls labels that are callable. For parameters that are callable themselves (an equinox module
        with `__call__`), `labels()` therefore returns a function of the parameters, which Optax takes as well.
        """
        if params is None and callable(self._names):
            return self.labels
        return self._labelled(lambda path: "manifold" if self._constrained(path) else "euclidean", params)

    def _labelled(self, label: Callable[[str], Any], params: Any) -> Any:
        if params is not None:
            return unboxed({path: label(path) for path in by_path(params)}, params)
        if self._names is None:
            raise ValueError("this plan was read from JSON and knows no tree: pass the parameters, as in mask(params)")
        return jax.tree.map(label, self._names)

    def _constrained(self, path: str) -> bool:
        collection = self[path]
        return collection is not None and collection.constrained

    def __repr__(self) -> str:
        return f"Plan({len(self.collections)} of {len(self)} parameters constrained, seed={self.seed})"

    def __str__(self) -> str:
        return _table(self)

    def to_json(self) -> str:
        """The plan as text: complete, and refused by `from_json` if a character of it changes."""
        parameters = {path: entry_to_json(entry) for path, entry in self.entries.items()}
        body = {"seed": self.seed, "order": list(self.order), "parameters": parameters}
        return json.dumps({"format": _FORMAT, "sha256": digest(body), **body})

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises ValueError if the text is not whole."""
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or document.get("format") != _FORMAT:
                raise ValueError(f"this is not a plan: its format is not {_FORMAT!r}")
            body = {"seed": document["seed"], "order": document["order"], "parameters": document["parameters"]}
            if set(document) != {"format", "sha256", *body} or document["sha256"] != digest(body):
                raise ValueError("the plan was damaged or changed after it was written: its checksum does not match")
            entries = {path: entry_from_json(entry) for path, entry in body["parameters"].items()}
            return Plan(entries, body["seed"], tuple(body["order"]))
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, zlib.error) as error:
            raise ValueError(f"the plan cannot be read: {error!r}") from error


def plan(
    params: Any,
    rules: Iterable[tuple[Pattern, Scheme | None]],
    *,
    seed: int = 0,
    gamma: str | float | Trace = "glorot",
    degenerate: str = "error",
    trace: Trace | None = None,
) -> Plan:
    """Decides for every parameter on which manifolds its matrices lie, and how they are grouped.

    Args:
      params: the parameters (arrays or `jax.ShapeDtypeStruct`s), of linen, NNX or any pytree.
      rules: pairs of a pattern and a scheme (None: unconstrained); the first that matches decides. A pattern is a shell
        glob on any suffix of whole components of the "/"-joined path (`Conv_*/kernel` finds `Block_0/Conv_0/kernel`;
        `*` crosses `/`; a name as it stands, such as `conv[0]`, finds itself) or a predicate `(path, leaf) -> bool`.
      seed: of the random positions (section 3 of the paper). Counts do not depend on it.
      gamma: the scale γ of eq. 2 where a manifold states no radius. `"glorot"`: (fan in + fan out)^-½ for grids of
        inputs × outputs, and 1 for views with one matrix per layer, head or neuron. A number: that, everywhere. A
        `Trace` (of `fg.nnx.trace` or `fg.linen.trace`): the literal eq. 2, with the traced output size in the fan out.
      degenerate: what becomes of manifolds of dimension 0 (1×1 slices, oblique matrices of one row): `"error"`, or
        `"euclidean"` to leave those matrices unconstrained.
      trace: tells the order of the layers, which λ uses in networks without normalization; given by `gamma` if that is
        a trace.

    Returns:
      The `Plan`: deterministic in the rules, the seed and the shapes.

    Raises:
      ValueError: a pattern that matches nothing, a parameter that no rule matches, two parameters of one path, a
        manifold of dimension 0, a constrained parameter that is not real floating point, or a view that does not fit or
        could be meant otherwise; the message names path and remedy.
      TypeError: a leaf that is no array, or something that is no rule.

    Example:
      >>> import jax.numpy as jnp
      >>> import fgsgd_jax as fg
      >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones(6)}}
      >>> rules = [("Conv_*/kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)]
      >>> fg.plan(params, rules)["Conv_0/kernel"].num_groups
      10
    """
    rules = checked_rules(rules)
    if degenerate not in ("error", "euclidean"):
        raise ValueError(f"degenerate={degenerate!r}: write 'error' or 'euclidean'")
    leaves = array_leaves(params)
    for pattern, _ in rules:
        if not any(matches(pattern, path, leaf) for path, leaf in leaves.items()):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter; correct it or drop the rule. The paths are "
                f"{_some(leaves)}"
            )
    entries = {}
    for path, leaf in leaves.items():
        scheme = _first_match(rules, path, leaf)
        try:
            entries[path] = _entry(path, leaf, scheme, seed, gamma, degenerate)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path} (shape {tuple(leaf.shape)}): {error}") from error
    names = unboxed({path: path for path in leaves}, params)
    trace = gamma if isinstance(gamma, Trace) else trace
    constrained = [path for path, entry in entries.items() if entry.collection and entry.collection.constrained]
    return Plan(entries, seed, trace.order(constrained) if trace else (), names)


def checked_rules(rules) -> list[tuple[Pattern, Scheme | None]]:
    """The rules as a list, if they are pairs of a pattern and a scheme."""
    rules = list(rules)
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and (isinstance(rule[0], str) or callable(rule[0]))):
            raise TypeError(
                f"{rule!r} is not a rule: write a pair (pattern, scheme), as in ('Conv_*/kernel', PIO([...]))"
            )
        if not (rule[1] is None or isinstance(rule[1], Scheme)):
            raise TypeError(
                f"the rule for {rule[0]!r} has {rule[1]!r} for a scheme: write Whole(...), Each(...), PI([...]), "
                "PO([...]), PIO([...]), Custom(...) or None"
            )
    return rules


def _first_match(rules, path: str, leaf: Any) -> Scheme | None:
    for pattern, scheme in rules:
        if matches(pattern, path, leaf):
            return scheme
    raise ValueError(f'no rule matches the parameter {path!r}; to leave the rest unconstrained, end with ("*", None)')


def _entry(
    path: str, leaf: Any, scheme: Scheme | None, seed: int, gamma: str | float | Trace, degenerate: str
) -> Entry:
    shape = tuple(leaf.shape)
    if scheme is None:
        return Entry(shape, None)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        remedy = (
            "complex weights are not supported" if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else "not weights"
        )
        raise ValueError(f"{remedy}: it is {leaf.dtype}; give it the scheme None")
    if scheme.layers and scheme.layers >= len(shape):
        raise ValueError(f"layers={scheme.layers} stacks all axes of this tensor; the axes of a layer follow them")
    layers, shape_of_layer = shape[: scheme.layers], shape[scheme.layers :]
    if 0 in shape:
        raise ValueError("it is empty; give it the scheme None")
    name = default_view(shape_of_layer) if scheme.view is None else scheme.view
    view = View.of(name, shape_of_layer, **scheme.sizes)
    inputs, outputs, *matrix = view.grid
    manifolds, notes = list(scheme.manifolds), []
    if not layers and (found := doubt(name, shape)):
        notes.append(found)
    for index, manifold in enumerate(manifolds):
        if manifold.dim(tuple(matrix)) == 0:
            matrices = f"{type(manifold).__name__} of {matrix[0]}×{matrix[1]} matrices"
            if degenerate == "error":
                raise ValueError(
                    f'{matrices} has dimension 0 and cannot train; write degenerate="euclidean" to leave them '
                    "unconstrained, or another view of the tensor"
                )
            manifolds[index] = Euclidean()
            notes.append(f"{matrices} has dimension 0: Euclidean")
    if len(manifolds) > (dealt := scheme.dealt_at_once(inputs, outputs)):
        notes.append(
            f"{dealt} {'matrix is' if dealt == 1 else 'matrices are'} dealt at a time, fewer than the "
            f"{len(manifolds)} manifolds: one each to manifolds drawn at random"
        )
    # A layer of a stack is drawn as the parameter that it would be in a list of the layers.
    member, group = scheme.deal_layers(
        layers, inputs, outputs, lambda index: Bits(seed, "/".join([path, *map(str, index)]))
    )
    if isinstance(gamma, Trace) and path not in gamma.positions and any(m.radius is UNSTATED for m in manifolds):
        raise ValueError(f"the trace met no call of this parameter's layer; it met {_some(gamma.positions)}")
    positions = gamma.positions[path] if isinstance(gamma, Trace) and path in gamma.positions else None
    scales = _gamma(view, manifolds, member, "glorot" if isinstance(gamma, Trace) else gamma, positions)
    collection = Collection(
        view, type(scheme).__name__, tuple(manifolds), member.astype(np.int16), group.astype(np.int32), scales, layers
    )
    return Entry(shape, collection, tuple(notes))


def _gamma(
    view: View, manifolds: list[Manifold], member: np.ndarray, gamma: str | float, positions: int | None
) -> float | np.ndarray:
    """γ of every matrix: the stated radius of its manifold, else what the plan says.

    Eq. 2 with b = C·A·B, and b̂ = H_out·W_out·D if the number of output positions is known, A·B·D (Glorot's) if not.
    """
    inputs, outputs, rows, cols = view.grid
    if gamma == "glorot":
        fan_out = (positions or rows * cols) * outputs
        default = 1.0 if view.mixes_channels else (rows * cols * inputs + fan_out) ** -0.5
    elif isinstance(gamma, (int, float)) and not isinstance(gamma, bool) and 0 < gamma < float("inf"):
        default = float(gamma)
    else:
        raise ValueError(f"gamma={gamma!r}: write 'glorot', a positive number, or a trace of the model")
    of_manifold = []
    for manifold in manifolds:
        radius = np.asarray(default if manifold.radius is UNSTATED else manifold.radius, np.float64)
        if not _broadcasts(radius.shape, member.shape):
            raise ValueError(f"a radius of shape {radius.shape} does not broadcast over the grid {member.shape}")
        if not (np.all(radius > 0) and np.all(np.isfinite(radius))):
            raise ValueError(f"{type(manifold).__name__}: the radius must be positive and finite, found {radius}")
        of_manifold.append(np.broadcast_to(radius, member.shape))
    scales = np.take_along_axis(np.stack(of_manifold), member[None], axis=0)[0]
    return float(scales.flat[0]) if np.all(scales == scales.flat[0]) else scales


def _broadcasts(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    return len(shape) <= len(grid) and all(
        length in (1, over) for length, over in zip(shape[::-1], grid[::-1], strict=False)
    )


def _entry_difference(here: Entry, there: Entry) -> str | None:
    if here.shape != there.shape:
        return f"shape {here.shape} here, {there.shape} there"
    a, b = here.collection, there.collection
    if a is b:
        return None
    if a is None or b is None:
        return f"{'un' if a is None else ''}constrained here, {'un' if b is None else ''}constrained there"
    if a.layers != b.layers:
        return f"layers {a.layers} here, {b.layers} there"
    first, second = a.describe(), b.describe()
    for field, value in first.items():
        if value != second[field]:
            return f"{field} {value} here, {second[field]} there"
    for field in ("member", "group", "gamma"):
        if not np.array_equal(getattr(a, field), getattr(b, field)):
            return f"{field} differs"
    return None


def _some(paths: Iterable[str]) -> str:
    first, others = (paths := list(paths))[:8], paths[8:]
    return ", ".join(first) + (f" and {len(others)} more" if others else "")


def _table(plan: Plan) -> str:
    header = ("path", "shape", "view", "scheme", "manifolds", "groups", "γ")
    rows: list[tuple[str, ...]] = [header]
    for path, entry in plan.entries.items():
        collection = entry.collection
        shape = "×".join(map(str, entry.shape)) or "scalar"
        if collection is None:
            rows.append((path, shape, "", "", "", "", ""))
            continue
        counts = np.bincount(collection.member.ravel(), minlength=len(collection.manifolds))
        members = zip(collection.manifolds, counts, strict=True)
        manifolds = " ".join(f"{type(manifold).__name__}:{count}" for manifold, count in members)
        gamma = np.asarray(collection.gamma)
        shown = f"{gamma.min():.3g}" + (f"–{gamma.max():.3g}" if gamma.max() > gamma.min() else "")
        rows.append(
            (
                path,
                shape,
                collection.view.pattern,
                collection.scheme + (f" × {math.prod(collection.layers)} layers" if collection.layers else ""),
                manifolds,
                str(collection.num_groups),
                shown,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    lines += [f"note: {path}: {note}" for path, entry in plan.entries.items() for note in entry.notes]
    return "\n".join(lines)
