"""This checkout beside an earlier commit, on one core and in turns: whole updates, kernels, and compile times.

    .venv-bench/bin/python benchmarks/versions.py 86f9b77        # into results/versions.json
    .venv-bench/bin/python benchmarks/versions.py 86f9b77 --only ResNet-20 "St(512, 128)" --turns 5

The programs are the updates of `updates.py`, and of the matrices of `kernels.py` the displacement that an update finds
and a step by the manifold's public maps. Each version has a process of its own, which waits while the
other runs. Times are medians; ratios are medians of the ratios within a turn. Compile times are CPU seconds to trace,
lower and compile the update or the step, the least of a few. The violation is that of the points after some steps.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
# Not in the folder of a device: what lies there is a part of bench.py, and in its tables.
RESULTS = HERE / "results" / "versions.json"
VERSIONS = ("before", "after")
# Seconds for the turns of a case; of compilations that take longer than this, one is enough.
AT_MOST, LONG = 40.0, 20.0
# Before a violation is measured.
STEPS = 20


def cases():
    """What makes the function and its arguments of every case, by name."""
    import jax
    import kernels
    import updates
    from peers import own_displacement

    import fgsgd_jax as fg

    # Version 0.1 has no floor of kernels: its updates call the public maps.
    of_update = own_displacement if importlib.util.find_spec("fgsgd_jax.kernels") else displacement_by_maps

    def update(network, rules):
        params, grads, plan = updates.example(network.shapes, rules)
        tx = fg.fgsgd(updates.RATE, plan, momentum=updates.MOMENTUM)
        return tx.update, (grads, tx.init(params), params)

    def step(function, manifold, shape):
        x, gs = kernels._arguments(manifold, shape)
        return functools.partial(function, manifold), (jax.device_put(x), jax.device_put(gs[0]))

    made = {
        f"{case}, {name}": (update, network, rules)
        for case, network in updates.NETWORKS.items()
        for name, rules in network.rules.items()
    }
    made |= {case: (step, of_update, *about) for case, about in kernels.CASES.items()}
    return made | {f"{case}, by maps": (step, step_by_maps, *about) for case, about in kernels.CASES.items()}


def step_by_maps(manifold, x, g):
    return manifold.retract(x, -manifold.project(x, g))


def displacement_by_maps(manifold, x, g):
    return step_by_maps(manifold, x, g) - x


class Child:
    """In the process of one version: does what it reads, a line at a time, and answers with a line."""

    def compile(self, case: str) -> float:
        import jax

        make, *about = cases()[case]
        function, self.arguments = make(*about)
        least = float("inf")
        for _ in range(3):
            jax.clear_caches()
            start = time.process_time()
            self.program = jax.jit(function).lower(*self.arguments).compile()
            least = min(least, time.process_time() - start)
            if least > LONG:
                break
        self.run()
        return least

    def run(self) -> float:
        import jax

        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        return time.perf_counter() - start

    def violation(self, case: str) -> float | None:
        """Of the points that displacements lead to; None for what is no displacement of a kernel."""
        import kernels
        from peers import violation

        if case not in kernels.CASES:
            return None
        x, g = self.arguments
        for _ in range(STEPS):
            x = x + self.program(x, g)
        return violation(kernels.CASES[case][0], x)

    def names(self) -> list[str]:
        return list(cases())

    def root(self) -> str:
        import fgsgd_jax

        return str(Path(fgsgd_jax.__file__).parents[1])

    def serve(self) -> None:
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        sys.stdout = sys.stderr
        for line in sys.stdin:
            name, *args = json.loads(line)
            print(json.dumps(getattr(self, name)(*args)), file=answers, flush=True)


class Version:
    """The parent's end of a child."""

    def __init__(self, root: Path):
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{HERE}", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "versions.py"), "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
        assert Path(self.ask("root")) == root.resolve(), f"{self.ask('root')} is not {root}"

    def ask(self, *words: str):
        given, answers = self.process.stdin, self.process.stdout
        assert given is not None
        assert answers is not None
        print(json.dumps(words), file=given, flush=True)
        return json.loads(answers.readline())

    def close(self) -> None:
        self.process.communicate()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A working tree of an earlier commit."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "before"
        git("worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(HERE), *words], check=True, capture_output=True, text=True).stdout.strip()


def measured(case: str, versions: dict[str, Version], turns: int) -> dict:
    """The figures of a row."""
    from timing import medians, ratio

    compiled = {name: version.ask("compile", case) for name, version in versions.items()}
    violations = {name: version.ask("violation", case) for name, version in versions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    begun = time.perf_counter()
    for turn in range(turns):
        if turn > 2 and time.perf_counter() - begun > AT_MOST:
            break
        # Each begins as often as the other.
        for name in VERSIONS if turn % 2 else reversed(VERSIONS):
            seconds[name].append(versions[name].ask("run"))
    return {
        "ratio": ratio(seconds, "after", "before"),
        "compile ratio": compiled["after"] / compiled["before"],
        "median": medians(seconds),
        "compile": compiled,
        "violation": violations,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the earlier commit")
    parser.add_argument("--only", nargs="+", default=[""], help="words that the names of cases begin with")
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from timing import pin

    pin(1)
    if options.child:
        return Child().serve()
    if options.commit is None:
        parser.error("name the earlier commit")
    from record import Record

    record = Record(RESULTS)
    commits = {"before": git("rev-parse", "--short", options.commit), "after": git("rev-parse", "--short", "HEAD")}
    with checkout(options.commit) as root:
        versions = dict(zip(VERSIONS, (Version(root), Version(HERE.parent)), strict=True))
        for case in versions["after"].ask("names"):
            if case.startswith(tuple(options.only)):
                record.row(case, "fgsgd_jax", **measured(case, versions, options.turns), commits=commits)
        for version in versions.values():
            version.close()


if __name__ == "__main__":
    main()
