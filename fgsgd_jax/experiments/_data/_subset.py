import dataclasses

import numpy as np

from ._images import ImageSet, Split

# What is held out of a set that comes without a split to test on.
TEST_SHARE = 0.2


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of all images whose every beginning is as balanced over the classes as the set allows.

    Each class is shuffled by the seed; then one image of each class is dealt after the other until the classes run out.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    # The rank of every image within its own class, in shuffled order.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    return shuffled[np.argsort(rank[shuffled], kind="stable")]


def limit(split: Split, count: int | None, seed: int = 0) -> Split:
    """A class-balanced, seeded subset of at most `count` images; `None` leaves the split as it is.

    The seed is not the run's: runs of different seeds that are to be compared train on the same images.
    """
    if count is None or count >= len(split):
        return split
    return split.take(balanced_order(split.labels, seed)[:count])


def split_off(split: Split) -> tuple[Split, Split, str]:
    """What to test on in a set that comes without a test: training images, test images, and a note for the user."""
    train_rows, test_rows, note = split_rows(split.labels)
    return split.take(train_rows), split.take(test_rows), note


def split_rows(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """The same by the images' places."""
    order = balanced_order(labels, seed=0)
    held = round(TEST_SHARE * len(order))
    note = (
        f"no split to test on: {held:,} of the images, {TEST_SHARE:.0%} of each class, are held out for it, the same "
        "in every run"
    )
    return order[held:], order[:held], note


def hold_out(data: ImageSet, fraction: float, seed: int = 0) -> ImageSet:
    """The same set with a class-balanced share of its training images in place of the test images.

    For choosing hyperparameters: the test images are not in what comes back, so they cannot be looked at.
    """
    held = round(fraction * len(data.train))
    order = balanced_order(data.train.labels, seed)
    note = f"tested on {held:,} of the training images, held out; the test images are left alone"
    return dataclasses.replace(
        data,
        train=data.train.take(order[held:]),
        test=data.train.take(order[:held]),
        notes=(*data.notes, note),
    )
