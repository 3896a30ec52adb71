"""How the figures of a task are spoken of, in the terminal and in pictures."""

from typing import NamedTuple

from ._config import Config


class Words(NamedTuple):
    """The words of one task."""

    lap: str
    """what the log's lines are counted in: the name of a figure of theirs"""
    legend: tuple[str, ...]
    """what loss and error are, in lines of at most 80 characters"""
    error: str
    """the title of errors in a picture"""
    norms: str
    """the title of norms in a picture"""


WORDS = {
    "images": Words(
        "epoch",
        ("loss, error: of the epoch's training images as it went / of the test images",),
        "Error",
        "Norms of the convolution kernels",
    ),
    "text": Words(
        "step",
        ("loss (nats a byte), error (of the likeliest byte): training text / held-out text",),
        "Error of the likeliest next byte",
        "Norms of the kernels",
    ),
}


def words_of(config: Config) -> Words:
    """The words for a config's task."""
    return WORDS[config.task]
