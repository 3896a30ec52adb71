"""Manifolds of a user's own: subclasses of the public class, with nothing else to import."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgsgd_jax as fg


@dataclasses.dataclass(frozen=True)
class Banded(fg.Sphere):
    """A sphere of matrices that are zero but for some rows."""

    rows: tuple[int, ...] = (0,)
    note: str = "band"

    def _mask(self, x):
        return jnp.zeros(x.shape[-2:], x.dtype).at[jnp.array(self.rows)].set(1)[(None,) * (x.ndim - 2)]

    def _project(self, x, g):
        return super()._project(x, self._mask(g) * g)

    def _nearest(self, x):
        return super()._nearest(self._mask(x) * x)

    def dim(self, shape):
        """Of the rows that are not zero."""
        return len(self.rows) * shape[1] - 1


class Plain(fg.Sphere):
    """Without fields of its own a subclass is a dataclass as it is."""


def test_a_subclass_is_a_pytree_of_its_radius():
    for manifold in (Banded(rows=(0, 2)), Plain(), Banded(radius=jnp.ones(2))):
        (radius,), structure = jax.tree.flatten(manifold)
        assert radius is manifold.radius
        again = jax.tree.unflatten(structure, [radius])
        assert type(again) is type(manifold)
        assert all(
            getattr(again, field.name) is getattr(manifold, field.name) for field in dataclasses.fields(manifold)
        )
        ((keys, _),) = jax.tree_util.tree_leaves_with_path(manifold)
        assert jax.tree_util.keystr(keys) == ".radius"
    structures = {jax.tree.structure(m) for m in (Plain(), fg.Sphere(), Banded(), Banded(rows=(1,)))}
    assert len(structures) == 4
    x = jax.jit(lambda m, x: m.nearest(x))(Banded(radius=2.0, rows=(1,)), jnp.ones((3, 4)))
    np.testing.assert_allclose(x, [[0] * 4, [1] * 4, [0] * 4])


def test_a_subclass_that_does_not_say_all_has_no_instances():
    class Half(fg.Manifold):
        def _project(self, x, g):
            return g

    with pytest.raises(TypeError, match="_retract"):
        Half()


def test_plans_of_subclasses_go_outside_and_come_back():
    params = {"w": jnp.zeros((3, 3, 4, 6))}
    plan = fg.plan(params, [("w", fg.PI([Banded(rows=(0, 2)), Plain(), fg.Stiefel()]))])
    for found in (fg.Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert found == plan
        assert found["w"].kinds == plan["w"].kinds  # tuples again, which have a hash
    assert "Banded:8" in str(plan)


def test_a_manifold_that_json_does_not_know():
    from fgsgd_jax.groups._json import _manifold_from_json

    with pytest.raises(ValueError, match=r"'Spheer'.*'Sphere'.*import its module") as error:
        _manifold_from_json({"name": "Spheer"})
    assert "Spherical" not in str(error.value)  # of which there are no instances
