"""Plans of one kernel, and their groups: what the tests of schemes, views and plans share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import fgsgd_jax as fg

FOUR = [fg.Sphere(), fg.Oblique(), fg.Stiefel(), fg.Euclidean()]
SCHEMES = {"PI": fg.PI, "PO": fg.PO, "PIO": fg.PIO}


def kernel(c, d, a=3, b=3):
    return {"k": jnp.zeros((a, b, c, d), jnp.float32)}


def collection(scheme, c, d, seed=0, a=3, b=3, **options):
    return fg.plan(kernel(c, d, a, b), [("k", scheme)], seed=seed, **options)["k"]


def arrays(scheme, c, d, seed=0):
    found = collection(scheme, c, d, seed)
    return np.asarray(found.member), np.asarray(found.group)


def groups_of(member, group):
    """{group: (manifold, slices' positions)}; a group on two manifolds is refused here, for every test."""
    assert member.shape == group.shape
    found = {}
    for number in np.unique(group):
        members = np.unique(member[group == number])
        assert len(members) == 1, f"group {number} is on {members}"
        found[int(number)] = (int(members[0]), np.argwhere(group == number))
    return found
