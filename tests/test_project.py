"""The project's papers: versions agree, and the manifold of CONTRIBUTING.md is one."""

import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_the_oldest_versions_tested_are_those_allowed():
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["flax"]]
    oldest = re.search(r"^OLDEST := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(requirements) == sorted(pin.replace("==", ">=") for pin in oldest)


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """The class of CONTRIBUTING.md, from a file of its own."""
    import importlib.util

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("contributed") / "centred_sphere.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CentredSphere


@pytest.mark.slow
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_the_contributed_manifold_is_a_manifold(contributed, radius):
    manifold, shape = contributed(radius=radius), (20, 3, 3)
    x = manifold.random_point(jax.random.key(0), shape, jnp.float64)
    g = jax.random.normal(jax.random.key(1), shape, jnp.float64)
    v = manifold.project(x, g)
    for point in (x, manifold.retract(x, v), manifold.exp(x, v), manifold.nearest(g), radius * manifold.origin((3, 3))):
        assert np.max(manifold.violation(point)) < 1e-6
    np.testing.assert_allclose(manifold.project(x, v), v, atol=1e-14)
    # Orthogonal to the normal space, which is spanned by the point and the constant matrix.
    np.testing.assert_allclose(manifold.inner(x, v, x), 0, atol=1e-14)
    np.testing.assert_allclose(jnp.sum(v, axis=(1, 2)), 0, atol=1e-13)
    y = manifold.exp(x, 0.3 * radius * v)
    np.testing.assert_allclose(manifold.exp(x, manifold.log(x, y)), y, atol=1e-12)
    # First order: the gap to the exponential falls with the square of the step at least.
    gaps = [jnp.max(jnp.abs(manifold.retract(x, t * v) - manifold.exp(x, t * v))) for t in (1e-2, 1e-3)]
    assert gaps[0] > 50 * gaps[1]
    # The dimension is the number of independent tangent vectors.
    basis = manifold.project(jnp.broadcast_to(x[:1], (9, 3, 3)), jnp.eye(9).reshape(9, 3, 3))
    assert np.linalg.matrix_rank(basis.reshape(9, 9), tol=1e-9) == manifold.dim((3, 3))


def test_the_contributed_manifold_trains_in_a_plan(contributed):
    params = {"kernel": jnp.zeros((3, 3, 4, 6), jnp.float32)}
    plan = fg.plan(params, [("kernel", fg.PIO([contributed(), fg.Stiefel()]))])
    params = fg.initialize(jax.random.key(0), params, plan)
    tx = fg.fgsgd(0.1, plan, momentum=0.9)

    @jax.jit
    def step(params, state, key):
        updates, state = tx.update({"kernel": jax.random.normal(key, (3, 3, 4, 6), jnp.float32)}, state, params)
        return {"kernel": params["kernel"] + updates["kernel"]}, state

    start, state = params, tx.init(params)
    for key in jax.random.split(jax.random.key(1), 20):
        params, state = step(params, state, key)
    assert float(fg.violation(params, plan)["kernel"]) < 1e-6
    assert np.max(np.abs(params["kernel"] - start["kernel"])) > 0.01
    member = plan["kernel"].member
    means = np.mean(params["kernel"], axis=(0, 1))
    assert np.max(np.abs(means[member == 0])) < 1e-7
    assert np.max(np.abs(means[member == 1])) > 1e-4
