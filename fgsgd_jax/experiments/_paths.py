"""Parameters by their "/"-joined paths, as plans name them."""

from collections.abc import Callable
from typing import Any

import jax


def by_path(tree: Any, separator: str = "/") -> dict[str, Any]:
    """The leaves by path, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(keys, separator): leaf for keys, leaf in leaves}


def mapped(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(_path(keys, "/"), leaf), tree)


def _path(keys: Any, separator: str) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=separator)
