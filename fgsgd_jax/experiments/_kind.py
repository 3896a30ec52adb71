from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np


class Kind(ABC):
    """What a comparison of one task is made of: its rows, the figure they are compared by, and the report's words."""

    rows: ClassVar[tuple[str, ...]]
    """those of a comparison that names none"""
    options: ClassVar[Mapping[str, str]]
    """what a row may change: fields of the config, by short names"""
    references: ClassVar[tuple[str, ...]]
    """the rows that all others are compared with, where they are there"""
    criterion: ClassVar[Literal["error", "loss"]]
    """the figure by which rows are tuned and compared"""
    unit: ClassVar[str]
    """of the criterion"""
    differences: ClassVar[str]
    """the unit of differences, in the plural"""
    figures: ClassVar[str]
    """what the report's figures are"""
    examples: ClassVar[str]
    """what is held out"""
    stretch: ClassVar[str]
    """what the training's course is counted in"""
    times: ClassVar[str] = ""
    """before each rate of the grid"""

    @abstractmethod
    def name(self, row: str, name: str) -> str:
        """The one name of a row without its changes, which has the given one; `row` is for errors."""

    @abstractmethod
    def fields(self, row: str, name: str) -> dict[str, Any]:
        """The fields of the config that the row's name stands for."""

    def rates(self, lrs: Sequence[float], name: str) -> tuple[float, ...]:
        """The rates that the grid stands for in a row of this name."""
        del name
        return tuple(lrs)

    @abstractmethod
    def hold_out(self, data: Any, share: float) -> Any:
        """The data with a share of what is trained on in place of the test."""

    @abstractmethod
    def setting(self, base: Any, comparison: Mapping[str, Any]) -> str:
        """What all rows have in common, in words."""

    def places(self, base: Any, count: int) -> np.ndarray:
        """Where in the training the log's lines are."""
        del base
        return np.arange(1, count + 1)


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def widened(comparison: Mapping[str, Any]) -> str:
    """How far a row's grid may go beyond that of all rows, in words."""
    more = comparison.get("widen", 0)
    return f", and up to {more} more beyond an end at which the best lay" if more else ""
