"""Names of parameters: one path per leaf, the same for linen and NNX."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax

Pattern = str | Callable[[str, Any], bool]


def path_of(key_path: tuple) -> str:
    """The path of a leaf, its components joined by "/".

    NNX wraps leaves in variables, whose paths end in `.value` in one call and do not in the next: it is left off.
    """
    if key_path and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of `tree` by path, in its order."""
    return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)}


def from_paths(leaves: dict[str, Any], like: Any) -> Any:
    """The tree of the structure of `like` with the given leaves, by path."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: leaves[path_of(key_path)], like)


def matches(pattern: Pattern, path: str, leaf: Any) -> bool:
    """Whether `pattern` finds the leaf: a shell glob on any suffix of whole components, or a predicate."""
    if not isinstance(pattern, str):
        return bool(pattern(path, leaf))
    components = path.split("/")
    return any(fnmatch.fnmatchcase("/".join(components[start:]), pattern) for start in range(len(components)))
