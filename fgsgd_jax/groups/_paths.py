"""Names of parameters: one path per leaf, the same for linen and NNX."""

import fnmatch
import functools
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import all_leaves, default_registry, keystr, tree_leaves_with_path

Pattern = str | Callable[[str, Any], bool]


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of `tree` by path, in its order.

    A path is the keys of a leaf (of dicts, fields and positions), joined by "/". Flax's boxes (variables of NNX,
    partitioned weights of linen) add none: they are in the tree in one call and not in the next.

    Raises:
      ValueError: two leaves have one path.
    """
    if is_leaf is None:
        nodes, structure = jax.tree.flatten(tree, is_leaf=_is_box)
        leaves = [_content(node) if _is_box(node) else node for node in nodes]
        if all_leaves(leaves):
            # Making thousands of keys takes longer than all the rest, and they depend on the structure alone.
            try:
                return dict(zip(_paths_of(structure), leaves, strict=True))
            except TypeError:
                pass  # some structures have no hash
    found = _with_keys(tree, is_leaf or (lambda node: False))
    return dict(zip(_distinct([keys for keys, _ in found]), [leaf for _, leaf in found], strict=True))


def array_leaves(tree: Any, role: str = "parameters") -> dict[str, Any]:
    """The leaves by path, if they are arrays or say the shape and dtype of one. `role`: what the tree holds."""
    leaves = by_path(tree)
    for path, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            remedy = (
                "jnp.asarray of it"
                if isinstance(leaf, (bool, int, float, complex))
                else (
                    "the tree of the parameters alone: nnx.state(model, nnx.Param) of an NNX model, eqx.filter(model, "
                    'eqx.is_inexact_array) of an equinox model, variables["params"] of a linen one'
                )
            )
            raise TypeError(
                f"{path}: the {role} are arrays, this is {reprlib.repr(leaf)} (a {type(leaf).__name__}); give {remedy}"
            )
    return leaves


def from_paths(leaves: dict[str, Any], like: Any) -> Any:
    """The tree of the structure of `like` with the given leaves, by path."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in by_path(like)])


def unboxed(leaves: dict[str, Any], like: Any) -> Any:
    """`from_paths` without Flax's boxes: a prefix of `like`, and of the same tree when its boxes are gone."""
    paths = iter(by_path(like))
    nodes, structure = jax.tree.flatten(like, is_leaf=_is_box)

    def filled(node: Any) -> Any:
        own = jax.tree.structure(_content(node) if _is_box(node) else node)
        return jax.tree.unflatten(own, [leaves[next(paths)] for _ in range(own.num_leaves)])

    return jax.tree.unflatten(structure, map(filled, nodes))


def matches(pattern: Pattern, path: str, leaf: Any) -> bool:
    """Whether `pattern` finds the leaf: a shell glob on any suffix of whole components, or a predicate.

    A name matches itself, whatever it would mean as a glob.
    """
    if not isinstance(pattern, str):
        return bool(pattern(path, leaf))
    return path == pattern or path.endswith(f"/{pattern}") or _glob(pattern).match(path) is not None


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern:
    return re.compile(f"(?s:.*/)?{fnmatch.translate(pattern)}")


@functools.lru_cache(maxsize=64)
def _paths_of(structure: Any) -> Sequence[str]:
    """The paths of a tree whose boxes are leaves."""
    leaves = tree_leaves_with_path(jax.tree.unflatten(structure, range(structure.num_leaves)))
    return _distinct([keys for keys, _ in leaves])


def _distinct(found: list[tuple]) -> Sequence[str]:
    keys_of: dict[str, tuple] = {}
    for keys in found:
        if (path := keystr(keys, simple=True, separator="/")) in keys_of:
            raise ValueError(
                f"two leaves have the path {path!r}: {keystr(keys_of[path])} and {keystr(keys)}; rename one of them"
            )
        keys_of[path] = keys
    return tuple(keys_of)


def _with_keys(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[tuple, Any]]:
    """The leaves of a tree with their keys, without those of boxes."""
    leaves = []
    for keys, node in tree_leaves_with_path(tree, lambda node: _is_box(node) or is_leaf(node)):
        if _is_box(node) and not is_leaf(node):
            leaves += [(keys + inner, leaf) for inner, leaf in _with_keys(_content(node), is_leaf)]
        else:
            leaves.append((keys, node))
    return leaves


def _content(box: Any) -> Any:
    (content,), _ = default_registry.flatten_one_level(box)  # pyright: ignore[reportGeneralTypeIssues]
    return content


def _is_box(node: Any) -> bool:
    cls = type(node)
    if cls not in _BOXES:
        # By name: the core does without flax. A field `value` of any other class is a component like the others.
        _BOXES[cls] = any(
            (base.__name__ == "Variable" and base.__module__.startswith("flax.nnx"))
            or (base.__name__ == "AxisMetadata" and base.__module__ == "flax.core.meta")
            for base in cls.__mro__
        )
    return _BOXES[cls]


# Of each class whether its objects are boxes.
_BOXES: dict[type, bool] = {}
