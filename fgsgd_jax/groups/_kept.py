"""A cache of bounded size."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

_MISSING = object()


class Kept(Generic[Value]):
    """Keeps at most `most` values by key, and drops the oldest first."""

    def __init__(self, most: int):
        self._most = most
        self._values: dict[Any, Value] = {}

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of a key, made if there is none; made every time if the key has no hash."""
        try:
            # One look-up: a key may hold thousands of leaves.
            value = self._values.get(key, _MISSING)
        except TypeError:
            return make()
        if value is not _MISSING:
            return value  # pyright: ignore[reportReturnType]
        value = self._values[key] = make()
        if len(self._values) > self._most:
            del self._values[next(iter(self._values))]
        return value
