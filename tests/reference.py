"""Algorithm 1 of the paper, one slice at a time, in float64 NumPy: slow, and written from the page alone.

Nothing here imports JAX or the library. A weight tensor is a list of slices, each with its manifold, radius and
group; a tensor without slices is unconstrained and gets plain SGD.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from helpers import project, retract


@dataclasses.dataclass
class Slice:
    """Where one matrix lies in its tensor, and on what."""

    index: tuple  # basic indexing, so that it is a view of the tensor
    shape: tuple[int, int]
    kind: str
    retraction: str | None
    radius: float
    group: int

    def of(self, tensor):
        return tensor[self.index].reshape(self.shape)

    def put(self, tensor, matrix):
        tensor[self.index] = matrix.reshape(tensor[self.index].shape)


def slices(manifolds, member, group, radius, locate):
    """The slices of a tensor, from integer arrays over its grid. `locate(c, d)` is an (index, shape).

    `manifolds` are (kind, retraction); `radius` is a number or an array over the grid.
    """
    member, group = np.asarray(member), np.asarray(group)
    radius = np.broadcast_to(np.asarray(radius, np.float64), member.shape)
    return [
        Slice(*locate(c, d), *manifolds[member[c, d]], float(radius[c, d]), int(group[c, d]))
        for c in range(member.shape[0])
        for d in range(member.shape[1])
    ]


def zeta(r, rho=1.0, c=0.0):
    """Eq. 5; eq. 7 at rho = 1, c = 0."""
    gamma = max((2 * rho + r) ** 2, 1 + c * (rho + r))
    return max(1.0, r**2 * gamma) ** 0.5


class FineGrainedSGD:
    """`weights` by path are updated in place by `step`; `layers` holds the slices of the constrained ones."""

    def __init__(self, weights, layers, momentum=None, nesterov=False, rho=1.0, c=0.0):
        self.weights = {path: np.array(w, np.float64) for path, w in weights.items()}
        self.layers = layers
        self.momentum, self.nesterov, self.rho, self.c = momentum, nesterov, rho, c
        self.buffers = {path: np.zeros_like(w) for path, w in self.weights.items()}
        self.zetas = {}

    def step(self, gradients, rate):
        for path, weight in self.weights.items():
            gradient = np.asarray(gradients[path], np.float64)
            if path in self.layers:
                self._constrained_step(path, weight, gradient, rate)
            else:
                weight -= rate * self._accumulate(path, gradient)

    def _accumulate(self, path, direction):
        """The heavy ball as `optax.trace` has it: the buffer is stored as it is, unprojected."""
        if self.momentum is None:
            return direction
        self.buffers[path] = direction + self.momentum * self.buffers[path]
        if self.nesterov:
            return direction + self.momentum * self.buffers[path]
        return self.buffers[path]

    def _constrained_step(self, path, weight, gradient, rate):
        groups = {}
        for s in self.layers[path]:
            groups.setdefault(s.group, []).append(s)

        direction = np.zeros_like(weight)
        for number, members in groups.items():
            # Line 5: the gradient on each component manifold.
            tangents = [project(s.kind, s.of(weight), s.of(gradient), s.radius) for s in members]
            # Eq. 6: the norm on the product.
            r = sum(float(np.sum(t * t)) for t in tangents) ** 0.5
            # Line 6.
            z = self.zetas[path, number] = zeta(r, self.rho, self.c)
            for s, t in zip(members, tangents, strict=True):
                s.put(direction, t / z)

        direction = self._accumulate(path, direction)

        for s in self.layers[path]:
            omega = s.of(weight)
            v = -rate * project(s.kind, omega, s.of(direction), s.radius)
            # Line 7. The result lies at the slice's radius by construction: rescaling by a constant R is the identity.
            s.put(weight, retract(s.kind, s.retraction, omega, v, s.radius))
