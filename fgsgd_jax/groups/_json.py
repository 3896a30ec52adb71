"""A plan's entries as JSON, and back."""

import base64
import hashlib
import inspect
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..manifolds import Manifold
from ._collection import Collection, Entry
from ._views import View


def digest(body: dict) -> str:
    """The checksum of a document."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _array_to_json(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array, dtype).tobytes(), 9)).decode()


def _array_from_json(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    # No more than the array needs, whatever the text would inflate to.
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(zlib.decompressobj().decompress(base64.b64decode(text), size + 1), dtype).reshape(shape)


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """What JSON has of one parameter: all of it, with arrays compressed."""
    document: dict[str, Any] = {"shape": list(entry.shape), "notes": list(entry.notes), "collection": None}
    if (collection := entry.collection) is not None:
        document["collection"] = {
            **collection.describe(),
            "member": _array_to_json(collection.member, "<i2"),
            "group": _array_to_json(collection.group, "<i4"),
            "gamma": _array_to_json(gamma, "<f8") if isinstance(gamma := collection.gamma, np.ndarray) else gamma,
        }
    return document


def entry_from_json(document: dict[str, Any]) -> Entry:
    """Undoes `entry_to_json`. Raises ValueError, LookupError, TypeError or zlib.error for what it did not write."""
    shape, found = tuple(document["shape"]), document["collection"]
    if found is None:
        return Entry(shape, None, tuple(document["notes"]))
    layers = shape[: len(found.get("layers", ()))]
    # The sizes are all known here, so the shape only has to agree with them.
    view = View.of(found["view"], shape[len(layers) :], **found["sizes"])
    grid = (*layers, *view.grid[:2])
    gamma = found["gamma"]
    collection = Collection(
        view,
        found["scheme"],
        tuple(_manifold_from_json(manifold) for manifold in found["manifolds"]),
        _array_from_json(found["member"], "<i2", grid).astype(np.int16),
        _array_from_json(found["group"], "<i4", grid).astype(np.int32),
        _array_from_json(gamma, "<f8", grid) if isinstance(gamma, str) else float(gamma),
        layers,
    )
    members, groups = collection.member, collection.group
    if members.min() < 0 or members.max() >= len(collection.manifolds) or groups.min() < 0:
        raise ValueError("the plan's members or groups are not of its manifolds")
    if not (np.all(np.asarray(collection.gamma) > 0) and np.all(np.isfinite(collection.gamma))):
        raise ValueError("the plan has a scale γ that is not positive and finite")
    return Entry(shape, collection, tuple(document["notes"]))


def _manifold_from_json(description: dict[str, Any]) -> Manifold:
    fields = dict(description)
    name = fields.pop("name")
    known = {cls.__name__: cls for cls in _concrete(Manifold)}
    if name not in known:
        raise ValueError(
            f"the plan has the manifold {name!r}, which is none of {sorted(known)}: import its module first"
        )
    return known[name](**{field: _hashable(value) for field, value in fields.items()})


def _hashable(value: Any) -> Any:
    # JSON has lists for tuples; the static fields of a manifold have a hash.
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _concrete(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield from _concrete(subclass)
        if not inspect.isabstract(subclass):
            yield subclass
