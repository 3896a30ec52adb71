"""Everything public compiles for TPUs and GPUs, by their own compilers, on a machine that has none of them.

The compilers are in the environment of `make accelerators`. `make test-accelerators` runs this there, and
`make test-all` its fast tests. A process of its own for each platform, since both are told what to do by environment
variables: tools/compiled.py.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PLATFORMS = ("tpu", "cuda")
UPDATES = [
    "fgsgd",
    "adamw",
    "riemannian_adam",
    "rescaling",
    "qr",
    "cayley",
    "exp",
    "spel",
    "manifold_muon",
    "hyperball",
]
OTHERS = {
    "shared/fgsgd",
    "shared/slices",
    "share_out/fgsgd",
    "weights/initialize",
    "weights/nearest",
    "weights/violation",
}

# In the fast tests.
FEW = (
    *("update/fgsgd", "update/fgsgd, without kernels", "update/rescaling"),
    *("shared/fgsgd", "shared/slices", "share_out/fgsgd"),
)

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("libtpu", "jax_plugins")),
    reason="needs the compilers of TPUs and GPUs: make test-accelerators",
)


@functools.cache
def compiled(platform, *patterns):
    from accelerators import _environment

    path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | _environment(platform) | {"PYTHONPATH": path}
    command = [sys.executable, ROOT / "tools" / "compiled.py", platform, *patterns]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_all_of_it_compiles(platform):
    found = compiled(platform)
    assert {name: each["error"] for name, each in found.items() if "error" in each} == {}
    assert OTHERS | {f"update/{name}" for name in UPDATES} <= set(found)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_slices_are_served_by_kernels(platform):
    found = compiled(platform, *FEW)
    for name in ("update/fgsgd", "update/rescaling", "shared/fgsgd", "share_out/fgsgd"):
        assert found[name]["pallas"] > 0, name
    assert found["update/fgsgd, without kernels"]["pallas"] == 0


@pytest.mark.parametrize("platform", PLATFORMS)
def test_of_shared_slices_only_norms_travel(platform):
    """Of "conv" an eighth of its size: sums over a group's matrices on other devices."""
    weights = 4 * 9 * 16 * 32
    assert compiled(platform, *FEW)["shared/slices"]["gathered"] < weights / 2
