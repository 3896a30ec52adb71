"""Every network is the one of its paper, whichever Flax API it is written in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from fgsgd_jax.experiments import UsageError, build
from fgsgd_jax.experiments._models import REGISTRY

# Learned numbers, on 3 channels: He et al. (2016) table 6 rounds the first three to 0.27M, 0.85M and 1.7M; those of
# ImageNet's networks are torchvision's, and timm's for the squeeze-and-excitation ones.
PARAMETERS = {
    ("resnet20", 10): 269_722,
    ("resnet56", 10): 853_018,
    ("resnet110", 10): 1_727_962,
    ("resnet50", 1000): 25_557_032,
    ("resnet101", 1000): 44_549_160,
    ("seresnet50", 1000): 28_088_024,
    ("linen-resnet20", 10): 269_722,
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def paths(tree):
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def deep_ones_slow(name, *values):
    return pytest.param(name, *values, marks=pytest.mark.slow if name in ("resnet101", "seresnet50") else ())


@pytest.mark.parametrize(("name", "classes"), [deep_ones_slow(*key) for key in PARAMETERS])
def test_as_many_parameters_as_in_the_paper(name, classes):
    params, _ = shapes(build(name, classes, 3))
    assert count(params) == PARAMETERS[name, classes]


def test_every_name_is_built():
    assert {"resnet8", "resnet110", "seresnet110", "seresnet101", "linen-resnet110"} <= set(REGISTRY)
    with pytest.raises(UsageError, match="unknown model 'resnet18': did you mean 'resnet"):
        build("resnet18", 10, 3)


@pytest.mark.parametrize(
    "name", [deep_ones_slow(name) for name in ("seresnet8", "linen-resnet8", "resnet50", "seresnet50")]
)
def test_logits_and_new_statistics_keep_their_shapes(name):
    model = build(name, 7, 3)
    params, stats = shapes(model)
    size = 224 if name.endswith("50") else 32
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    for train in (True, False):
        logits, new, _ = jax.eval_shape(lambda p, s, x: model.apply(p, s, x, train, False), params, stats, images)  # noqa: B023
        assert logits.shape == (2, 7)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, stats)


def test_parameters_are_called_by_their_place():
    params, stats = shapes(build("seresnet14", 10, 1))
    names = paths(params)
    assert type(params) is dict
    assert {"stem/kernel", "stage_0/block_1/conv_0/kernel", "stage_2/block_0/norm_1/scale", "head/kernel"} <= set(names)
    assert params["stage_1"]["block_0"]["conv_0"]["kernel"].shape == (3, 3, 16, 32)
    assert all(path.endswith(("/mean", "/var")) for path in paths(stats))


@pytest.fixture(scope="module")
def resnet8():
    model = build("resnet8", 10, 1)
    # Random numbers take long to compile at the default level.
    params, stats = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    return model, params, stats


@pytest.mark.parametrize("train", [True, False])
def test_linen_and_nnx_are_the_same_network(resnet8, train):
    model, params, stats = resnet8
    linen = build("linen-resnet8", 10, 1)
    assert jax.tree.map(jnp.shape, shapes(linen)) == jax.tree.map(jnp.shape, (params, stats))
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1), jnp.float32)
    for one, other in zip(
        jax.tree.leaves(model.apply(params, stats, images, train, False)),
        jax.tree.leaves(linen.apply(params, stats, images, train, False)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_statistics_move_in_training_only(resnet8):
    model, params, stats = resnet8
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1), jnp.float32)
    _, kept, _ = model.apply(params, stats, images, False, False)
    _, moved, _ = model.apply(params, stats, images, True, False)
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, stats))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, moved, stats)))
    # A tenth of the way from 1 towards the batch's variance.
    features = jax.lax.conv_general_dilated(
        images, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(moved["stem_norm"]["var"], 0.9 + 0.1 * features.var((0, 1, 2)), rtol=1e-4)
