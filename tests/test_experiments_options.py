"""What the options' words stand for: schemes, schedules, augmentation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")
import fgsgd_jax as fg
from fgsgd_jax.experiments import TrainConfig, UsageError, rules, schedule
from fgsgd_jax.experiments._augment import augment, padding, resolve


@pytest.mark.parametrize(
    ("name", "kinds", "groups"),
    [
        ("st", ["Stiefel"], 1),
        ("each-ob", ["Oblique"], 24),
        ("poms-st", ["Stiefel"] * 3, 12),
        ("pi:sp+st", ["Sphere", "Stiefel"], 8),
        ("po:sp+ob+st+euc", ["Sphere", "Oblique", "Stiefel", "Euclidean"], 24),
        ("pio:sp+st", ["Sphere", "Stiefel"], 10),
    ],
)
def test_schemes_deal_the_manifolds_that_they_name(name, kinds, groups):
    params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6))}, "small": {"kernel": jnp.zeros((1, 1, 4, 6))}}
    plan = fg.plan(params, rules(name, "qr"), degenerate="euclidean")
    collection = plan["conv/kernel"]
    assert [type(manifold).__name__ for manifold in collection.manifolds] == kinds
    assert np.unique(collection.group).size == groups
    assert all(manifold.retraction == "qr" for manifold in collection.manifolds if isinstance(manifold, fg.Stiefel))
    assert list(plan.collections) == ["conv/kernel"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stiefel", "unknown scheme 'stiefel'"),
        ("poms-sp", "did you mean 'poms-st'"),
        ("pio", "there are euc, sp, ob, st, each-sp"),
        ("pio:sp+euk", r"unknown manifold in the scheme 'pio:sp\+euk': 'euk': did you mean 'euc'"),
        ("pio:", "there are sp, ob, st, euc"),
        ("pio:sp+sp", "names a manifold twice"),
    ],
)
def test_unknown_schemes_are_refused_with_what_there_is(name, said):
    with pytest.raises(UsageError, match=said):
        rules(name)


def test_schedules_fall_as_they_should():
    rates = {name: [float(schedule(name, 0.4, 100)(step)) for step in (0, 49, 50, 75, 99)] for name in (
        "cosine", "step", "eq4", "constant"
    )}  # fmt: skip
    assert all(values[0] == pytest.approx(0.4) for values in rates.values())
    np.testing.assert_allclose(rates["step"], [0.4, 0.4, 0.04, 0.004, 0.004], rtol=1e-6)
    assert rates["cosine"][-1] < 0.001
    assert rates["constant"] == pytest.approx([0.4] * 5)
    assert np.all(np.diff(rates["eq4"]) < 0)
    assert rates["eq4"][-1] == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("batch_size", -1), ("lr", 0.0), ("momentum", 1.0), ("validation", 1.0), ("gamma", -1.0),
     ("weight_decay", -1e-4), ("rho", float("nan")), ("seed", -1), ("limit_train", 0)],
)  # fmt: skip
def test_options_outside_their_range_are_named(option, value):
    with pytest.raises(UsageError, match="--" + option.replace("_", "-")):
        dataclasses.replace(TrainConfig(), **{option: value}).check()


# Augmentation.


def test_crops_are_windows_of_the_padded_image():
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 8, 8, 1)), jnp.uint8)
    crops = np.asarray(augment(jax.random.key(0), images, "crop"))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = set()
    for image, crop in zip(padded, crops, strict=True):
        found = [(i, j) for i in range(3) for j in range(3) if np.array_equal(image[i : i + 8, j : j + 8], crop)]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) == 9
    assert (padding(32), padding(8), padding(4)) == (4, 1, 1)


def test_about_half_of_the_images_are_flipped():
    images = jnp.asarray(np.random.default_rng(0).integers(1, 256, (400, 1, 8, 1)), jnp.uint8)
    # Crops of a height of 1 leave a black row two times in three: look at the columns of those that stayed.
    out = np.asarray(augment(jax.random.key(1), images, "crop-flip"))
    same = flipped = 0
    for image, result in zip(np.asarray(images), out, strict=True):
        if np.array_equal(image, result):
            same += 1
        elif np.array_equal(image[:, ::-1], result):
            flipped += 1
    # 400 · ⅓ (row kept) · ⅓ (column kept) · ½ of each: 22 ± 5.
    assert 8 <= same <= 40
    assert 8 <= flipped <= 40


def test_digits_are_not_flipped_and_none_is_none():
    assert resolve("auto", "digits") == "crop"
    assert resolve("auto", "cifar10") == "crop-flip"
    assert resolve("none", "cifar10") == "none"
    images = jnp.zeros((2, 8, 8, 1), jnp.uint8)
    assert augment(jax.random.key(0), images, "none") is images
