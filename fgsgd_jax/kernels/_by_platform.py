"""A computation that each platform does in its own way, chosen when the program is lowered for it.

`lax.platform_dependent` would trace the ways of all platforms, and knows nothing of how many devices a program is for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Way = Callable[..., Any]
Ways = tuple[tuple[str, Callable[[bool], Way]], ...]


def by_platform(default: Way, ways: Mapping[str, Callable[[bool], Way]], like: Any, *args: Any) -> Any:
    """`default(*args)`, or on a platform that has a way of its own, what that does.

    Args:
      default: what every other platform does; derivatives and batches are those of it.
      ways: by platform, given whether every array is whole where the program runs: on one device, or in `shard_map`.
      like: shapes and dtypes of the result, in its structure; `default` is traced where it is needed alone.
      *args: pytrees of arrays.
    """
    leaves, structure = jax.tree.flatten(_varying(args))
    shapes, result = jax.tree.flatten(like)

    def flat(way: Way) -> Callable[..., list[Any]]:
        def of_leaves(*leaves: Any) -> list[Any]:
            found, own = jax.tree.flatten(way(*jax.tree.unflatten(structure, leaves)))
            assert own == result, (own, result)
            return found

        return of_leaves

    flat_ways = tuple((name, lambda whole, of=of: flat(of(whole))) for name, of in ways.items())
    types = tuple((each.shape, each.dtype) for each in shapes)
    return jax.tree.unflatten(result, _by_platform_p.bind(*leaves, default=flat(default), ways=flat_ways, types=types))


def _varying(args: Any) -> Any:
    """The arguments, in `shard_map` of a type that differs between devices where that of any of them does."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return args
    nothing = sum(jnp.zeros_like(leaf, jnp.float32, shape=()) for leaf in jax.tree.leaves(args))

    def varied(leaf: Array) -> Array:
        return leaf + nothing.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(varied, args)


_by_platform_p = Primitive("fgsgd_jax_by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_impl
def _eager(*leaves: Array, default: Way, ways: Ways, types: Any) -> list[Array]:
    del types
    devices = set().union(*(leaf.devices() for leaf in leaves))
    names = {"cuda" if device.platform == "gpu" else device.platform for device in devices}
    of = dict(ways).get(names.pop()) if len(devices) == 1 else None
    # Not jitted: the functions are new in every call, and would be compiled in every call.
    return (default if of is None else of(True))(*leaves)


@_by_platform_p.def_abstract_eval
def _types(*leaves: Any, default: Way, ways: Ways, types: Any) -> list[Any]:
    del default, ways
    like = next(leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    return [like.update(shape=shape, dtype=dtype, weak_type=False) for shape, dtype in types]


def _lowering(platform: str | None) -> Any:
    def rule(ctx: Any, *leaves: Any, default: Way, ways: Ways, types: Any) -> Any:
        del types
        of = dict(ways).get(platform)
        return mlir.lower_fun(default if of is None else of(_is_whole(ctx)))(ctx, *leaves)

    return rule


def _is_whole(ctx: Any) -> bool:
    """Whether the program sees whole arrays: it is for one device, or all axes of the mesh are manual."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    if isinstance(context, mlir.SPMDAxisContext):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return True


mlir.register_lowering(_by_platform_p, _lowering(None))
for _platform in ("cpu", "tpu", "cuda"):
    mlir.register_lowering(_by_platform_p, _lowering(_platform), _platform)


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], default: Way, **params: Any) -> Any:
    found = _by_platform_p.bind(*primals, default=default, **params)
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return found, jax.jvp(default, primals, tangents)[1]


def _batched(leaves: Sequence[Any], axes: Sequence[Any], default: Way, **params: Any) -> Any:
    del params
    found = jax.vmap(default, tuple(axes))(*leaves)
    return found, [0] * len(found)


ad.primitive_jvps[_by_platform_p] = _derivative
batching.primitive_batchers[_by_platform_p] = _batched
