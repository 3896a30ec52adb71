"""What `make accelerators` reads in a compiled program, on a program written by hand."""

import dataclasses
import json

import accelerators_here
import jax
import pytest
from accelerators import FGSGD, RESULTS, SGD, TEXTS, Rows, Workload, filled, summary, table
from accelerators_hlo import cost, size

import fgsgd_jax as fg

PROGRAM = """HloModule step

%fused (a: f32[8,128], b: f32[2,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[2,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %update = f32[8,128]{1,0} dynamic-update-slice(%a, %b, %zero, %zero)
}

%cheap (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %negate = f32[8,128]{1,0} negate(%x)
}

%dear (y: f32[8,128]) -> f32[8,128] {
  %y = f32[8,128]{1,0} parameter(0)
  %exp = f32[8,128]{1,0} exponential(%y)
  ROOT %log = f32[8,128]{1,0} log(%exp)
}

%body (z: f32[8,128]) -> f32[8,128] {
  %z = f32[8,128]{1,0} parameter(0)
  ROOT %sine = f32[8,128]{1,0} sine(%z)
}

%more (w: f32[8,128]) -> pred[] {
  %w = f32[8,128]{1,0} parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: f32[8,128], q: f32[2,128], i: s32[]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = f32[2,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %kernel = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%done), custom_call_target="tpu_custom_call"
  %fusion = f32[8,128]{1,0} fusion(%kernel, %q), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  %branch = f32[8,128]{1,0} conditional(%i, %fusion, %fusion), branch_computations={%cheap, %dear}
  %loop = f32[8,128]{1,0} while(%branch), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %gather = f32[16,128]{1,0} all-gather(%loop), dimensions={0}
}
"""


def test_cost():
    found, whole = cost(PROGRAM), 4 * 8 * 128
    # The Pallas call, the fusion, the cheap branch, and three turns.
    assert found.launches == 6
    assert (found.pallas, found.cycles, found.branches, found.loops) == (1, 70, 1, 1)
    update = 4 * 2 * 128
    # In place: the update is read and written, and nothing else of the buffer.
    assert found.bytes == 2 * whole + 2 * update + 2 * whole + 3 * 2 * whole + 3 * whole
    # The kernel's operand and result are in VMEM; the copy reads main memory once.
    assert found.memory == whole + 2 * update + 2 * whole + 3 * 2 * whole + 3 * whole
    assert found.collectives == ("all-gather",)
    assert found.gathered == 2 * whole


def test_loops_whose_condition_counts():
    """A TPU's compiler does not say how often they run."""
    condition = """%more (w: f32[8,128], turn: s32[]) -> pred[] {
  %w = f32[8,128]{1,0} parameter(0)
  %turn = s32[] parameter(1)
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %lt = pred[] compare(%turn, %limit), direction=LT
}
"""
    own = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    own = own.replace("sine(%z)", 'sine(%z), backend_config={"estimated_cycles":"5"}')
    start, end = own.index("%more"), own.index("ENTRY")
    # One turn, of how many the step decides.
    found = cost(own)
    assert (found.launches, found.cycles, found.turn) == (4, 70 + 5, 5)
    # Three turns, and a comparison before each.
    found = cost(own[:start] + condition.replace("LIMIT", "3") + own[end:])
    assert (found.launches, found.cycles, found.turn) == (6 + 3, 70 + 3 * 5, 0)


def test_sizes():
    assert size("(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)}, s8[], pred[5])").bytes == 24 + 8 + 1 + 5
    assert size("bf16[4]{0:T(256)S(1)}").memory == 0


def test_table():
    row = {"target": "H100", "case": "one", "processor": 1.0, "weights": 4, "bytes": 30, "memory": 30, "cycles": None}
    row |= {"launches": 2, "pallas": 1, "temporary": 1, "branches": 0, "loops": 0, "collectives": {"all-reduce": 2}}
    text = table([row | {"name": "fgsgd"}, row | {"name": "optax.sgd", "bytes": 20}])
    assert "1.5 × sgd" in text
    assert "2 all-reduce" in text


def test_summary():
    row = {"case": "St(768, 768)", "processor": 1.0, "weights": 4, "bytes": 30, "memory": 30, "temporary": 2}
    rows = [row | {"target": "H100", "name": "fgsgd"}, row | {"target": "H100", "name": "optax.sgd", "bytes": 20}]
    assert "| St(768, 768) | — · — · 1 | — · — · 1.5 | — | — · — · 1 | — · — · 0.5 |" in summary(rows)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_json(path):
    text, own = path.read_text(encoding="utf-8"), TEXTS[path](json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    assert own in text
    assert filled(text, own) == text
    assert filled(text.replace(own, "| of another version |"), own) == text


def test_workloads_run_on_the_device_that_there_is():
    rules = [("*", fg.PIO([fg.Sphere(), fg.Stiefel()]))]
    own = Workload({"kernel": (3, 3, 2, 4)}, rules, donate=True)
    update, sgd = accelerators_here._measured("cpu", jax.devices(), own, [FGSGD, SGD], None)
    assert 0 < update["violation"] < 1e-6
    assert min(update["steps"]) > 0
    assert len(update["steps"]) == accelerators_here.TURNS
    assert "violation" not in sgd
    (left,) = accelerators_here._measured("cpu", jax.devices()[:1], dataclasses.replace(own, mesh="each"), [SGD], None)
    assert left["left out"] == "it needs four devices, here are 1"
    own = Workload({"kernel": (3, 3, 2, 4)}, rules, initialize=True)
    (first,) = accelerators_here._measured("cpu", jax.devices(), own, ["initialize"], None)
    assert first["step"] > 0
    assert "| it needs four devices" in accelerators_here.table([{"case": "one"} | left])
    assert accelerators_here.table([{"case": "one"} | each for each in (update, sgd)]).count("| one |") == 2


def test_a_row_that_is_renewed_stays_where_it_was(tmp_path):
    rows = [{"target": "TPU v5e", "case": "one", "name": name, "left out": "old"} for name in (FGSGD, SGD)]
    kept = Rows(tmp_path / "rows.json", rows)
    kept.add(rows[0] | {"left out": "new"})
    assert json.loads(kept.path.read_text())["rows"] == [rows[0] | {"left out": "new"}, rows[1]]
