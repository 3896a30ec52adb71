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
from fgsgd_jax.experiments._clip import clip_groups
from fgsgd_jax.experiments._config import Config
from fgsgd_jax.experiments._optimizer import make_optimizer, make_plan
from fgsgd_jax.experiments._schemes import pooled


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
        ("pio", "there are euc, wn, sp, ob, st, each-sp"),
        ("pio:sp+euk", r"unknown manifold in the scheme 'pio:sp\+euk': 'euk': did you mean 'euc'"),
        ("pio:", "there are sp, ob, st, euc"),
        ("pio:sp+sp", "names a manifold twice"),
    ],
)
def test_unknown_schemes_are_refused_with_what_there_is(name, said):
    with pytest.raises(UsageError, match=said):
        rules(name)


def test_options_of_a_task_say_everything():
    with pytest.raises(TypeError, match=r"abstract methods '?check'?, '?load'?, '?names'?, '?rate"):
        Config("images")  # pyright: ignore


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
     ("weight_decay", -1e-4), ("rho", float("nan")), ("clip", 0.0), ("seed", -1), ("limit_train", 0)],
)  # fmt: skip
def test_options_outside_their_range_are_named(option, value):
    with pytest.raises(UsageError, match="--" + option.replace("_", "-")):
        dataclasses.replace(TrainConfig(), **{option: value}).check()


# The optimizers.

CONFIG = TrainConfig(weight_decay=0.01)
SHAPES = {"bias": jnp.zeros(6), "conv": {"kernel": jnp.zeros((3, 3, 4, 6))}}


def options(**changes):
    return dataclasses.replace(CONFIG, **changes).check()


def trained(config, gradients):
    """The parameters before and after these gradients, at a rate of 0.1."""
    plan = make_plan(config, SHAPES, 0, fg.Trace(()))
    drawn = jax.random.normal(jax.random.key(0), (3, 3, 4, 6))
    before = {"bias": jnp.ones(6), "conv": {"kernel": drawn}}
    before = before if plan is None else fg.nearest(before, plan)
    tx = make_optimizer(config, lambda count: 0.1 + 0.0 * count, plan, 1)
    update, after = jax.jit(tx.update), before
    state = tx.init(before)
    for g in gradients:
        updates, state = update(g, state, after)
        after = jax.tree.map(jnp.add, after, updates)
    return before, after


def gradients(count, scale):
    drawn = np.random.default_rng(0).normal(0, scale, (count, 3, 3, 4, 6))
    return [{"bias": jnp.full(6, scale), "conv": {"kernel": jnp.asarray(g)}} for g in drawn]


def test_groups_to_normalize_by_need_not_be_those_of_the_manifolds():
    st, poms, pio3 = (
        make_plan(options(scheme=name), SHAPES, 7, fg.Trace(())) for name in ("st", "poms-st", "pio:sp+ob+st")
    )
    assert pooled(st, "scheme") is st
    np.testing.assert_array_equal(pooled(st, "pio")["conv/kernel"].group, poms["conv/kernel"].group)
    np.testing.assert_array_equal(pooled(pio3, "pio")["conv/kernel"].group, pio3["conv/kernel"].group)
    sizes = {"layer": 1, "slice": 24, "pi": 12, "po": 18}
    assert {name: pooled(pio3, name)["conv/kernel"].num_groups for name in sizes} == sizes


@pytest.mark.usefixtures("lenient_promotion")
def test_normalizing_by_the_schemes_own_groups_changes_nothing():
    """Two ways to say the same: `fgsgd`, and line 6 inside of `on_manifolds`."""
    given, config = gradients(3, 0.3), options(scheme="pio:sp+ob+euc")
    _, expected = trained(config, given)
    _, found = trained(dataclasses.replace(config, pooling="pio"), given)
    _, other = trained(dataclasses.replace(config, pooling="layer"), given)
    for one, same in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-9, atol=1e-12)
    assert not np.allclose(other["conv"]["kernel"], expected["conv"]["kernel"], rtol=1e-3)


@pytest.mark.usefixtures("lenient_promotion")
def test_zeta_off_clipped_and_on_differ_where_groups_are_long():
    def moved(zeta, scale):
        before, after = trained(options(scheme="pi:sp", pooling="layer", zeta=zeta, momentum=0.0), gradients(1, scale))
        # Small steps along a sphere of 24 slices: their length is that of the tangent vectors.
        return float(jnp.linalg.norm(after["conv"]["kernel"] - before["conv"]["kernel"])) / 0.1

    small = [moved(zeta, 1e-3) for zeta in ("off", "clip", "on")]
    assert small == pytest.approx([small[0]] * 3, rel=1e-9)
    r = small[0] * 100
    assert r > 1
    assert moved("clip", 0.1) == pytest.approx(np.sqrt(2) - 1, rel=0.01)
    assert moved("on", 0.1) == pytest.approx(1 / (2 + r), rel=0.01)


@pytest.mark.usefixtures("lenient_promotion")
def test_late_normalization_bounds_the_step_and_not_the_gradient():
    """Of a gradient that stays the same, momentum sums the normalized parts; a late ζ bounds every step by R/ζ."""

    def moved(zeta, steps, momentum=0.9):
        config = options(scheme="pi:sp", pooling="layer", zeta=zeta, momentum=momentum)
        before, after = trained(config, gradients(1, 0.1) * steps)
        return float(jnp.linalg.norm(after["conv"]["kernel"] - before["conv"]["kernel"])) / 0.1

    assert moved("late", 2, 0.0) == pytest.approx(moved("on", 2, 0.0), rel=1e-9)
    assert moved("late", 4) < 4 * (np.sqrt(2) - 1)
    assert moved("on", 4) > moved("late", 4) * 1.2


def test_groups_are_clipped_and_nothing_else():
    plan = fg.plan(SHAPES, [("conv/kernel", fg.PIO([fg.Sphere(), fg.Stiefel()])), ("*", None)], seed=3)
    (given,) = gradients(1, 0.5)
    link = clip_groups(plan, 2.2)
    found, _ = link.update(given, link.init(given))
    collection = plan["conv/kernel"]
    lengths = []
    for group in range(collection.num_groups):
        before, after = (np.asarray(t["conv"]["kernel"])[:, :, collection.group == group] for t in (given, found))
        lengths.append(np.linalg.norm(before))
        np.testing.assert_allclose(after, before * min(1, 2.2 / lengths[-1]), rtol=1e-12)
    assert min(lengths) < 2.2 < max(lengths)
    np.testing.assert_array_equal(found["bias"], given["bias"])


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("scheme", ["euc", "sp"])
def test_clipping_shortens_all_gradients_by_one_factor(scheme):
    given = gradients(3, 0.5)
    lengths = [np.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g))) for g in given]
    by_hand = [jax.tree.map(lambda leaf, n=n: leaf * 0.7 / n, g) for g, n in zip(given, lengths, strict=True)]
    assert min(lengths) > 0.7
    _, expected = trained(options(scheme=scheme), by_hand)
    _, found = trained(options(scheme=scheme, clip=0.7), given)
    for one, same in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-9)


@pytest.mark.usefixtures("lenient_promotion")
def test_weight_normalization_is_momentum_sgd_on_length_and_direction():
    """Against eq. 3 of Salimans & Kingma in NumPy; the weight decay is of g and v."""
    given = gradients(4, 0.5)
    before, after = trained(options(scheme="wn"), given)
    v = np.asarray(before["conv"]["kernel"]).reshape(36, 6)
    g, bias = np.linalg.norm(v, axis=0), np.ones(6)
    buffers = [np.zeros_like(each) for each in (g, v, bias)]
    for step in given:
        to_w, norm = np.asarray(step["conv"]["kernel"]).reshape(36, 6), np.linalg.norm(v, axis=0)
        to_g = (to_w * v).sum(0) / norm
        to_v = g / norm * to_w - g * to_g / norm**2 * v
        for place, (grad, value) in enumerate([(to_g, g), (to_v, v), (np.asarray(step["bias"]), bias)]):
            buffers[place] = 0.9 * buffers[place] + grad + 0.01 * value
        g, v, bias = (value - 0.1 * buffer for value, buffer in zip((g, v, bias), buffers, strict=True))
    expected = (g * v / np.linalg.norm(v, axis=0)).reshape(3, 3, 4, 6)
    np.testing.assert_allclose(after["conv"]["kernel"], expected, rtol=1e-9)
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-9)


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
