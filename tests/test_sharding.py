"""Shared out over eight fake devices: the same result as on one, wherever weights lie and however axes are typed.

The devices have to be asked for before JAX starts, so the trainings run in a process of their own: tools/sharded.py.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
SCRIPT = TESTS.parent / "tools" / "sharded.py"
DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "2"}
TYPES = ("Auto", "Explicit")
LAYOUTS = ("data", "outputs", "inputs", "fully")
OPTIMIZERS = ("fgsgd", "chain", "adam", "spel", "riemannian_adam")
USUAL = "Explicit/fully/fgsgd"
OTHERS = [f"{kind}/{layout}/{name}" for kind in TYPES for layout in LAYOUTS for name in OPTIMIZERS]
SLICES = [f"gathers/{kind}/{name}/conv/conv2" for kind, name in (("Auto", "fgsgd"), ("Explicit", "adam"))]
ROWS = "gathers/Explicit/fgsgd/tall"
SHARED_OUT = [f"shared out/{kind}/{name}" for kind in TYPES for name in ("fgsgd", "chain", "adam")]
EARLY = ["early/Auto/fgsgd/conv2", "early/Explicit/adam/conv/conv2"]
KERNELS = [
    f"kernels/{form}/{place}" for form in ("tpu", "cuda") for place in ("Auto/data", "Auto/inputs", "Explicit/fully")
]
WHOLE = "gathers/Auto/fgsgd/qr"


def results(*cases):
    # What it shares with the tests beside it lies there.
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | DEVICES | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, SCRIPT, *cases], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual():
    return results(USUAL, *SLICES, ROWS)


@pytest.fixture(scope="module")
def others():
    return results(*(case for case in OTHERS if case != USUAL), *SHARED_OUT, WHOLE, "checkpoint")


def check(found):
    assert found["gap"] <= 2e-6
    assert found["radii"] <= 1e-6
    assert found["violation"] <= 1e-6
    assert found["near"] <= 1e-6
    assert found["moved"] > 0.05
    assert found["stable"]
    assert found["placed"]


@pytest.mark.slow
def test_the_same_as_on_one_device(usual):
    check(usual[USUAL])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in OTHERS if case != USUAL])
def test_every_optimizer_does_the_same_as_on_one_device(others, case):
    check(others[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLICES)
def test_slices_shared_out_over_channels_stay_where_they_are(usual, case):
    assert usual[case] == []


@pytest.fixture(scope="module")
def early():
    return results(*EARLY)


@pytest.mark.parametrize("case", EARLY)
def test_it_does_not_matter_when_the_plan_was_made(early, case):
    """From shapes, from JSON, from rules at every call: the update is that of a plan of sharded weights."""
    found = early[case]
    assert found["exchanged"] == []
    assert found["same"] == {"shapes": True, "JSON": True, "rules": True}
    # All of the state lies where the weights do: what a checkpoint is restored to can be stepped from.
    assert found["devices"] == [8]


@pytest.mark.slow
def test_rows_shared_out_stay_where_they_are(usual):
    """Enough of them for the squares of a column to be added up by parts."""
    assert usual[ROWS] == []


@pytest.fixture(scope="module")
def kernels():
    return results(*KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_take_the_part_of_each_device(kernels, case):
    found = kernels[case]
    assert found["gap"] <= 4e-6
    assert found["exchanged"] == []
    assert found["placed"]


@pytest.mark.slow
def test_gathers_are_found(others):
    """Of a matrix whose columns are on different devices, QR needs the whole."""
    assert others[WHOLE]


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED_OUT)
def test_each_device_can_retract_its_part_of_the_matrices(others, case):
    found = others[case]
    assert found["gap"] <= 2e-6
    assert found["violation"] <= 1e-6
    assert found["moved"] > 0.05
    assert found["placed"]
    # A device has two of eleven matrices to retract; projection and the rest it does for all.
    assert found["flops"] < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 1])
def test_a_checkpoint_goes_on_with_other_devices(others, count):
    found = others["checkpoint"][str(count)]
    assert found["devices"] == count
    assert found["exact"] == 0
    assert found["gap"] <= 2e-6
    assert found["difference"] is None
    # What `fgsgd train --resume` refuses with.
    assert "seed" in found["other"] or "differs" in found["other"]
