"""Whole updates compiled ahead of time for TPUs and GPUs that are not there, and what their compilers say of them.

No figure here is a time on a device. For each workload and target: the seconds that tracing, lowering and compiling
take; the kernels launched and the bytes that they read and write; XLA's own estimate of the cycles of its kernels on
TPU, which it has none of for Pallas calls; temporary memory; branches, loops and collectives. A step is
`tx.update` and `optax.apply_updates` in one program.

Each target has a process of its own; two run at a time. With `--here` the same workloads run on the device that there
is: see accelerators_here.py.
"""

import argparse
import collections
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results" / "accelerators.json"

# Platform and topology of one device and of four.
TARGETS = {
    "TPU v5e": ("tpu", "v5e:2x2"),
    "TPU v6e": ("tpu", "v6e:2x2"),
    "H100": ("cuda", "1x1x4"),
}
PACKAGES = ("jax", "jaxlib", "optax", "fgsgd-jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
FGSGD, SGD, MUON = "fgsgd", "optax.sgd", "optax.contrib.muon"
SPEL, COARSE, MANIFOLD_MUON = "fg.spel", "fg.spel, coarse", "fg.manifold_muon"
OPTIMIZERS = (FGSGD, SGD, MUON, SPEL, COARSE, MANIFOLD_MUON)
# What a reader is told first.
SUMMARY = {
    "ResNet-110, PIO": FGSGD,
    "St(768, 768)": FGSGD,
    "GPT-2 small, by matrices": FGSGD,
    "ResNet-110, initialize": "initialize",
}


@dataclass(frozen=True)
class Workload:
    """What is compiled: an update by each of `optimizers`, or `fg.initialize`, on a device or on a mesh of four."""

    shapes: dict[str, tuple[int, ...]]
    rules: list
    optimizers: tuple[str, ...] = (FGSGD, SGD)
    initialize: bool = False
    # On a mesh: that the plan is made before or after the parameters are sharded, or that each device has all of them.
    mesh: Literal["before", "after", "each"] | None = None
    # Whether the buffers of weights and state are handed over, as a training loop may do.
    donate: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether a device has a part of the channels only."""
        return self.mesh in ("before", "after")


def workloads() -> dict[str, Workload]:
    import updates

    import fgsgd_jax as fg

    resnets = {depth: updates.cifar_resnet(depth) for depth in (20, 56, 110)}
    gpt2, one = updates.gpt2(12), {"w": (768, 768)}
    heads = {f"{layer}": (768, 12 * 64) for layer in range(4)}
    by_heads = [("*", fg.Whole(fg.Stiefel(), view="i (h d) -> 1 h i d", h=12))]
    by_matrices = [("*", fg.Whole(fg.Stiefel(), view="i o -> 1 1 i o"))]
    found = {f"ResNet-{depth}, PIO": Workload(shapes, updates.SLICES) for depth, shapes in resnets.items()}
    found |= {
        f"ResNet-{depth}, initialize": Workload(resnets[depth], updates.SLICES, initialize=True) for depth in (20, 110)
    }
    found |= {
        f"ResNet-20, PIO, four devices, plan {when}": Workload(resnets[20], updates.SLICES, mesh=when)
        for when in ("before", "after")
    }
    found["ResNet-20, PIO, on each of four devices"] = Workload(resnets[20], updates.SLICES, mesh="each")
    return found | {
        "ResNet-20, PIO, donated": Workload(resnets[20], updates.SLICES, donate=True),
        "St(768, 768)": Workload(one, by_matrices, (FGSGD, SGD, MUON, SPEL, COARSE)),
        "St(3072, 768)": Workload({"w": (3072, 768)}, by_matrices, (FGSGD, SGD, MUON, SPEL, COARSE, MANIFOLD_MUON)),
        "4 × 12 heads St(768, 64)": Workload(heads, by_heads),
        "ResNet-50, Stiefel by filters": Workload(updates.imagenet_resnet((3, 4, 6, 3)), updates.FILTERS),
        "GPT-2 small, by heads": Workload(gpt2, updates.HEADS),
        "GPT-2 small, by matrices": Workload(gpt2, updates.MATRICES, (FGSGD, SGD, MUON)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name has one of these words")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), help="of those of a case")
    parser.add_argument("--results", type=Path, help="the JSON, whose other rows stay")
    parser.add_argument("--here", action="store_true", help="run them on this machine's own device, and time them")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--table", action="store_true", help="only print what the JSON has")
    parser.add_argument("--dump", type=Path, help="a folder for the compiled programs' text")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    if options.here:
        import accelerators_here

        return accelerators_here.run(options)
    options.results = options.results or RESULTS
    rows = json.loads(options.results.read_text(encoding="utf-8"))["rows"] if options.results.exists() else []
    if not options.table:
        table_of = Rows(options.results, rows)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda target: measured(target, table_of, options), options.targets))
        rows = table_of.rows
    print(table(rows))
    if options.results == RESULTS:
        for path, make in TEXTS.items():
            path.write_text(filled(path.read_text(encoding="utf-8"), make(rows)), encoding="utf-8")


class Rows:
    """The rows of a JSON, written as they come."""

    def __init__(self, path: Path, rows: list[dict]):
        self.path, self.rows, self._lock = path, rows, threading.Lock()

    def add(self, row: dict) -> None:
        key = (row["target"], row["case"], row["name"])
        with self._lock:
            rows = {(old["target"], old["case"], old["name"]): old for old in self.rows} | {key: row}
            # In one order, whichever target is first; a row that is renewed stays where it was.
            self.rows = sorted(rows.values(), key=lambda each: _place(each["target"], TARGETS))
            write(self.path, self.rows)
        print(f"  {' · '.join(key)}: {_shown(row)}", flush=True)


def _place(name: str, order: Collection[str]) -> int:
    return list(order).index(name) if name in order else len(order)


def measured(target: str, rows: Rows, options: argparse.Namespace) -> None:
    """Adds this target's rows; a case that ends its process is noted and passed."""
    command = [sys.executable, __file__, "--inside", target, "--optimizers", *options.optimizers]
    command += ["--only", *options.only] if options.only else []
    command += ["--dump", str(options.dump)] if options.dump else []
    environment = os.environ | _environment(TARGETS[target][0])
    done: list[str] = []
    while True:
        program = subprocess.Popen(
            [*command], env=environment | {"ACCELERATORS_DONE": json.dumps(done)}, stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        for line in program.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            row = json.loads(line)
            if list(row) == ["begun"]:
                done.append(row["begun"])
                continue
            rows.add(row)
        if not program.wait():
            return
        print(f"{target}: {done[-1:]} ended its process with {program.returncode}; the others go on", flush=True)
        if not done:
            return


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text('{"rows": [\n' + lines + "\n]}\n", encoding="utf-8")


def _environment(platform: str) -> dict[str, str]:
    found = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if platform == "tpu":
        found |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3"}
        # Processes that only compile need not wait for each other.
        return found | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # Without a device no kernel can be tried, so none is chosen by its time.
    spec = importlib.util.find_spec("nvidia")
    cuda = Path(next(iter(spec.submodule_search_locations))) / "cu13" if spec else ""
    return found | {"XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda}"}


def inside(options: argparse.Namespace) -> None:
    """One target's rows on standard output, a JSON a line, in this process."""
    import jax

    target, done = options.inside, json.loads(os.environ.get("ACCELERATORS_DONE", "[]"))
    platform, topology = TARGETS[target]
    devices = _devices(platform, topology)
    # What a first compilation loads is no figure of a workload.
    x = jax.ShapeDtypeStruct((8, 128), jax.numpy.float32, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    jax.jit(lambda x: x + 1).trace(x).lower(lowering_platforms=(platform,)).compile()
    for case, workload in workloads().items():
        names = [name for name in workload.optimizers if name in options.optimizers]
        for name in ["initialize"] if workload.initialize else names:
            full = f"{case} · {name}"
            if full in done or (options.only and not any(word in full for word in options.only)):
                continue
            print(json.dumps({"begun": full}), flush=True)
            row = {"target": target, "case": case, "name": name}
            try:
                dump = options.dump and options.dump / f"{target} {full}.txt"
                row |= compiled(platform, workload, program(devices, workload, name), dump)[1]
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                row["left out"] = f"{type(error).__name__}: {first[:300]}"
            print(json.dumps(row | {"cores used": len(os.sched_getaffinity(0)), "versions": _versions()}), flush=True)


def _devices(platform: str, topology: str) -> list:
    from jax.experimental import topologies

    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    text = (FOLDER / "accelerators_h100.txtpb").read_text(encoding="utf-8")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=text, topology=topology
    ).devices


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Program(NamedTuple):
    """What is compiled: a function, its arguments' shapes, and which of them it may overwrite.

    Of an update also what it begins with: the plan of its weights, and their first state.
    """

    function: Callable[..., Any]
    arguments: tuple
    donated: tuple[int, ...] = ()
    plan: Any = None
    init: Callable[[Any], Any] | None = None


def compiled(
    platform: str, workload: Workload, program: Program, dump: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """The compiled program, and a row's figures of it."""
    import jax
    from accelerators_hlo import cost

    jax.clear_caches()
    # Beside other work the clock says little of a compiler; its processor time does.
    start, processor = time.perf_counter(), time.process_time()
    traced = jax.jit(program.function, donate_argnums=program.donated).trace(*program.arguments)
    lowered = traced.lower(lowering_platforms=(platform,))
    middle = time.perf_counter()
    made = lowered.compile()
    end, processor = time.perf_counter(), time.process_time() - processor
    text, memory = made.as_text(), made.memory_analysis()
    if dump:
        dump.parent.mkdir(parents=True, exist_ok=True)
        dump.write_text(text, encoding="utf-8")
    found = cost(text)
    return made, {
        "seconds": end - start,
        "lower": middle - start,
        "processor": processor,
        "weights": 4 * sum(map(_size, workload.shapes.values())) // (4 if workload.is_shared else 1),
        "bytes": found.bytes,
        "memory": found.memory,
        "cycles": found.cycles if platform == "tpu" else None,
        "turn": found.turn if platform == "tpu" else None,
        "launches": found.launches,
        "pallas": found.pallas,
        "temporary": memory.temp_size_in_bytes,
        "branches": found.branches,
        "loops": found.loops,
        "collectives": dict(collections.Counter(found.collectives)),
        "gathered": found.gathered,
    }


def program(devices: list, workload: Workload, name: str) -> Program:
    """A workload by an optimizer, or by `fg.initialize`, as shapes of arrays on these devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    import fgsgd_jax as fg

    if workload.mesh:
        mesh = Mesh(np.array(devices[:4]), ("channels",))
        one = NamedSharding(mesh, PartitionSpec())
        over = NamedSharding(mesh, PartitionSpec(None, None, None, "channels")) if workload.is_shared else one
    else:
        one = over = SingleDeviceSharding(devices[0])
    bare = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in workload.shapes.items()}
    params = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over) for path, x in bare.items()}
    plan = fg.plan(params if workload.mesh == "after" else bare, workload.rules)
    if workload.initialize:
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=one)
        return Program(lambda key, params: fg.initialize(key, params, plan), (key, params))
    tx = {
        FGSGD: lambda: fg.fgsgd(0.1, plan, momentum=0.9, shardings=over if workload.mesh else None),
        SGD: lambda: optax.sgd(0.1, momentum=0.9),
        SPEL: lambda: fg.spel(0.1, plan),
        COARSE: lambda: fg.spel(0.1, plan, coarse=True),
        MANIFOLD_MUON: lambda: fg.manifold_muon(0.1, plan),
        MUON: lambda: optax.contrib.muon(1e-3, muon_weight_dimension_numbers=_as_matrices),
    }[name]()

    def placed(path, leaf):
        """What mirrors a parameter lies where it does; all else on every device."""
        own = any(getattr(entry, "key", None) in bare and bare[entry.key].shape == leaf.shape for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over if own else one)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, bare))
    return Program(step, (params, state, params), (1, 2) if workload.donate else (), plan, tx.init)


def _as_matrices(params):
    import updates

    return updates._as_matrices(params)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _shown(row: dict[str, Any]) -> str:
    if "left out" in row:
        return f"left out: {row['left out']}"
    hidden = {"target", "case", "name", "weights", "gathered", "cores used", "versions", "machine", "steps"}
    shown = {key: value for key, value in row.items() if key not in hidden}
    short = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in shown.items()}
    return ", ".join(f"{key} {value}" for key, value in short.items())


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each workload and target."""
    header = ["workload", "target", "lower and compile, processor s", "bytes", "main memory", "cycles"]
    header += ["launches (Pallas)", "temporary / weights", "branches, loops", "collectives"]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        if row["name"] in (SGD, MUON):
            continue
        if "left out" in row:
            lines.append([_titled(row), row["target"], row["left out"], *[""] * (len(header) - 3)])
            continue
        beside = {each["name"]: each for each in rows if _key(each) == _key(row) and "left out" not in each}
        others = {name: beside[full] for name, full in (("sgd", SGD), ("Muon", MUON)) if full in beside}
        sums = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
        lines.append(
            [
                _titled(row),
                row["target"],
                _beside(row["processor"], {name: each["processor"] for name, each in others.items()}),
                *(_bytes(row, key, others) for key in ("bytes", "memory")),
                _cycles(row, others),
                _beside(
                    row["launches"], {"Pallas": row["pallas"]} | {n: each["launches"] for n, each in others.items()}
                ),
                f"{row['temporary'] / row['weights']:.2g}",
                f"{row['branches']}, {row['loops']}",
                sums or "—",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """The same of a few workloads, in a line each."""
    found = {(row["case"], row["target"], row["name"]): row for row in rows if "left out" not in row}
    header = [f"compiled for {' · '.join(TARGETS)}", "in processor s", "bytes, `optax.sgd` = 1", "Muon = 1"]
    lines = [[*header, "of main memory, sgd = 1", "temporary, weights = 1"], ["---", *["---:"] * 5]]
    for case, name in SUMMARY.items():

        def by_target(key: str, beside: str, name: str = name, case: str = case) -> str:
            """The figure on every target, over that of another optimizer or over another figure."""
            values = []
            for target in TARGETS:
                row = found.get((case, target, name), {})
                other = found.get((case, target, beside), {}).get(key) if beside in OPTIMIZERS else row.get(beside, 1)
                values.append(_number(row[key] / other) if row and other else "—")
            return "—" if set(values) == {"—"} else " · ".join(values)

        lines.append([case, by_target("processor", ""), by_target("bytes", SGD), by_target("bytes", MUON)])
        lines[-1] += [by_target("memory", SGD), by_target("temporary", "weights")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TEXTS = {ROOT / "README.md": summary, FOLDER / "README.md": table}


def filled(text: str, own: str) -> str:
    """The text with this table between its marks."""
    marks = re.compile("(<!-- accelerators:begin -->\n).*?(<!-- accelerators:end -->)", re.DOTALL)
    return marks.sub(lambda match: f"{match[1]}{own}\n{match[2]}", text)


def _titled(row: dict[str, Any]) -> str:
    return row["case"] if row["name"] not in (SPEL, COARSE, MANIFOLD_MUON) else f"{row['case']}, `{row['name']}`"


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["target"], row["case"]


def _beside(value: float, others: dict[str, float]) -> str:
    return _number(value) + (
        f" ({', '.join(f'{name} {_number(each)}' for name, each in others.items())})" if others else ""
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _ratios(value: float, others: dict[str, float]) -> str:
    return ", ".join(f"{value / each:.3g} × {name}" for name, each in others.items())


def _bytes(row: dict[str, Any], key: str, others: dict[str, dict[str, Any]]) -> str:
    ratios = _ratios(row[key], {name: each[key] for name, each in others.items()})
    return ratios or f"{row[key] / row['weights']:.3g} × weights"


def _cycles(row: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    if row["cycles"] is None:
        return "—"
    ratios = _ratios(row["cycles"], {name: each["cycles"] for name, each in others.items()})
    return ratios or f"{row['cycles'] / 1e6:.2g} million"


if __name__ == "__main__":
    main()
