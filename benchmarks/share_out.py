"""The update of large Stiefel matrices that every device holds: each device with its part of the retraction or all.

Run with one fake device for each core: XLA_FLAGS=--xla_force_host_platform_device_count=2. Prints a line and writes
JSON.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, medians, ratio, side_by_side

import fgsgd_jax as fg


def programs(count, shape, mesh):
    """The compiled update and its arguments, without and with the retraction shared out."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = {str(n): jnp.zeros(shape) for n in range(count)}
    plan = fg.plan(params, [("*", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))])
    params = jax.device_put(fg.initialize(jax.random.key(0), params, plan), everywhere)
    rng = np.random.default_rng(0)
    grads = {path: 0.05 * rng.standard_normal(shape).astype(np.float32) for path in params}
    grads = jax.device_put(grads, everywhere)
    for share_out in (None, mesh):
        tx = fg.fgsgd(0.1, plan, momentum=0.9, share_out=share_out)
        state = jax.device_put(tx.init(params), everywhere)
        yield jax.jit(tx.update, out_shardings=everywhere).lower(grads, state, params).compile(), (grads, state, params)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/share_out.json"))
    options = parser.parse_args()
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    names = ("each", "shared out")
    compiled = dict(zip(names, programs(options.count, tuple(options.shape), mesh), strict=True))
    seconds = side_by_side(
        {
            name: lambda program=program, arguments=arguments: program(*arguments)
            for name, (program, arguments) in compiled.items()
        },
        options.repeats,
    )
    figures = machine() | {
        "matrices": options.count,
        "shape": list(options.shape),
        "devices": len(jax.devices()),
        "seconds": seconds,
        "flops": {name: program.cost_analysis()["flops"] for name, (program, _) in compiled.items()},
        "times as fast": ratio(seconds, "each", "shared out"),
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{medians(seconds)} s; shared out {figures['times as fast']:.2f} times as fast")


if __name__ == "__main__":
    main()
