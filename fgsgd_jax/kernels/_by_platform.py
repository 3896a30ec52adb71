"""A computation that each platform does in its own way, chosen when the program is lowered for it.

`lax.platform_dependent` would trace the ways of all platforms, and does not know how many devices a program is for.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Way = Callable[..., Any]


class Program(NamedTuple):
    """What is known of a program when it is lowered.

    `is_shared`: its arrays may lie on several devices. It is False inside `shard_map`, where a program sees the part of
    one device. `is_exported`: it is kept for other releases than this one.
    """

    is_shared: bool
    is_exported: bool


def by_platform(
    default: Way,
    ways: Mapping[str, Callable[[Program], Way]],
    like: Any,
    *args: Any,
    batched: Way | None = None,
) -> Any:
    """`default(*args)`; on a platform that has a way of its own, that way instead.

    Args:
      default: what every other platform does; derivatives are those of it.
      ways: by platform, made for a program.
      like: the shapes and dtypes of the result, in its structure, so that nothing is traced before it is lowered.
      *args: pytrees of arrays.
      batched: what `jax.vmap` makes of it, given the arguments with one more axis in front; None for the default's.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        args = _varying(args)
    leaves, structure = jax.tree.flatten(args)
    shapes, result = jax.tree.flatten(like)
    types = tuple((each.shape, each.dtype) for each in shapes)
    of_leaves = functools.partial(_of_leaves, structure, result)
    found = _by_platform_p.bind(
        *leaves, default=default, ways=tuple(ways.items()), types=types, batched=batched, of_leaves=of_leaves
    )
    return jax.tree.unflatten(result, found)


def _of_leaves(structure: Any, result: Any, way: Way, *leaves: Any) -> list[Any]:
    """A way from leaves to leaves."""
    found, own = jax.tree.flatten(way(*jax.tree.unflatten(structure, leaves)))
    assert own == result, (own, result)
    return found


_SHARED: contextvars.ContextVar[bool | None] = contextvars.ContextVar("shared", default=None)


def is_shared() -> bool:
    """Whether arrays may lie on several devices: in the program that is being lowered, or else in this process."""
    known = _SHARED.get()
    return jax.device_count() > 1 if known is None else known


def _varying(args: Any) -> Any:
    """The arguments, each of which varies over all axes of the mesh over which any of them does."""
    nothing: Any = sum(jnp.zeros_like(leaf, jnp.float32, shape=()) for leaf in jax.tree.leaves(args))
    return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), args)


_by_platform_p = Primitive("fgsgd_jax_by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_impl
def _eager(*leaves: Any, default: Way, ways: Any, of_leaves: Any, **params: Any) -> list[Array]:
    del params
    arrays = [jnp.asarray(leaf) for leaf in leaves]  # some may be NumPy's
    devices = set().union(*(array.devices() for array in arrays))
    names = {"cuda" if device.platform == "gpu" else device.platform for device in devices}
    of = dict(ways).get(names.pop()) if len(devices) == 1 else None
    # Not jitted: these functions are new in every call. What they call may be, even where a user has all else run
    # operation by operation.
    with jax.disable_jit(False):
        return of_leaves(default if of is None else of(Program(False, False)), *arrays)


@_by_platform_p.def_abstract_eval
def _types(*leaves: Any, types: Any, **params: Any) -> list[Any]:
    del params
    like = next(leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    return [like.update(shape=shape, dtype=dtype, weak_type=False) for shape, dtype in types]


def _lowering(platform: str | None) -> Any:
    def rule(ctx: Any, *leaves: Any, default: Way, ways: Any, of_leaves: Any, **params: Any) -> Any:
        del params
        parameters, context = ctx.module_context.lowering_parameters, ctx.module_context.axis_context
        if isinstance(context, mlir.SPMDAxisContext):
            shared = set(context.manual_axes) != set(context.mesh.axis_names)
        else:
            shared = isinstance(context, mlir.ShardingContext) and context.num_devices != 1
        of = dict(ways).get(platform)
        way = default if of is None else of(Program(shared, parameters.for_export))
        # Where `is_shared` is known.
        own = contextvars.copy_context()
        own.run(_SHARED.set, shared)
        return own.run(mlir.lower_fun(functools.partial(of_leaves, way)), ctx, *leaves)

    return rule


mlir.register_lowering(_by_platform_p, _lowering(None))
for _platform in ("cpu", "tpu", "cuda"):
    mlir.register_lowering(_by_platform_p, _lowering(_platform), _platform)


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], default: Way, of_leaves: Any, **params: Any) -> Any:
    found = _by_platform_p.bind(*primals, default=default, of_leaves=of_leaves, **params)
    own = functools.partial(of_leaves, default)
    return found, jax.jvp(own, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))[1]


def _batched(
    leaves: Sequence[Any], axes: Sequence[Any], default: Way, batched: Way | None, of_leaves: Any, **params: Any
) -> Any:
    del params
    if batched is None:
        found = jax.vmap(functools.partial(of_leaves, default), tuple(axes))(*leaves)
    else:
        size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
        found = of_leaves(batched, *(_in_front(leaf, axis, size) for leaf, axis in zip(leaves, axes, strict=True)))
    return found, [0] * len(found)


def _in_front(leaf: Any, axis: int | None, size: int) -> Array:
    return jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)


ad.primitive_jvps[_by_platform_p] = _derivative
batching.primitive_batchers[_by_platform_p] = _batched
