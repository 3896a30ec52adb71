"""The benchmarks: every part makes rows that say what they hold for, and the texts' tables are those of the JSON."""

import importlib.util
import json
import sys
from pathlib import Path

import growth
import jax
import kernels
import numpy as np
import peers
import pictures
import pytest
import steps
import tables
import updates
import versions
from matplotlib.figure import Figure
from record import Record

import fgsgd_jax as fg

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("users_settings")

FIELDS = {"case", "name", "median", "seconds", "device", "cores used", "versions"}
TINY = {"64 × St(64, 16)": (fg.Stiefel(), (2, 4, 2)), "Ob(576, 512)": (fg.Oblique(), (1, 4, 2))}


@pytest.fixture
def record(tmp_path):
    return lambda part, **options: Record(tmp_path / "here" / f"{part}.json", quick=True, **options)


def check(part, folder):
    """The JSON's rows; the table of each has them all."""
    found = json.loads((folder / f"{part}.json").read_text())
    assert {"device", "cores", "cores used", "jax"} <= set(found["machine"])
    for row in found["rows"]:
        assert set(row) >= FIELDS
        assert row["versions"]["jax"] == found["machine"]["jax"]
        assert row["median"] > 0
    table = tables.TABLES[part](tables.Results(folder))
    assert all(row["name"] in table for row in found["rows"])
    return found["rows"], found["left out"]


def test_kernels(record, tmp_path):
    kernels.measure(record("kernels"), TINY)
    rows, left = check("kernels", tmp_path / "here")
    for case in TINY:
        own = {row["name"]: row for row in rows if row["case"] == case}
        assert own["fgsgd_jax"]["violation"] < 1e-6
        assert own["fgsgd_jax"]["over ours"] == 1
        assert "violation" not in own["copy"]
        # A library is measured, or left out with the reason.
        for peer in ("geoopt", "riemannax"):
            assert (peer in own) != any(each["case"] == case and each["name"] == peer for each in left)
    results = tables.Results(tmp_path / "here")
    assert "Ob(576, 512)" in tables.ratios(results)
    assert "not measured" in tables.targets(results)
    assert "missed by a factor of" in tables.targets(results)
    pictures.draw(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_a_panel_without_rows_says_so(tmp_path):
    axes = Figure().subplots()
    pictures._growth(axes, tables.Results(tmp_path), ("layers", "slices"))
    assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_updates_and_memory(record, tmp_path):
    shapes = {"a/kernel": (3, 3, 2, 3), "b/kernel": (3, 3, 2, 3)}
    updates.measure(
        record("updates"),
        {"tiny": updates.Network(shapes, {"fgsgd": [("*", fg.Whole(fg.Stiefel(), view="h w i o -> 1 1 (h w i) o"))]})},
    )
    rows, left = check("updates", tmp_path / "here")
    assert not left
    assert {row["name"] for row in rows} == {"fgsgd", "optax.sgd", "optax.adamw", "optax.contrib.muon"}
    (ours,) = (row for row in rows if row["name"] == "fgsgd")
    assert ours["violation"] < 1e-6
    # The weights in float32, and a momentum of the same size in the state.
    assert ours["weights"] == 4 * 2 * 54 <= ours["state"]
    assert "| tiny: optax.sgd | 0.0 | 0.0 | 0.0 | +0.00 | +0.00 |" in tables.memory(tables.Results(tmp_path / "here"))


def test_growth(record, tmp_path):
    growth.measure(record("growth"), layers=(), slice_counts=(), sizes=(4,))
    rows, _ = check("growth", tmp_path / "here")
    assert {row["name"] for row in rows} == {"fgsgd_jax", "products", "jnp.linalg.qr"}


class Here:
    """A version whose child is in this process."""

    def __init__(self):
        self.child = versions.Child()

    def ask(self, name, *args):
        return json.loads(json.dumps(getattr(self.child, name)(*args)))


@pytest.fixture
def tiny_versions(monkeypatch):
    spheres = updates.Network({"a/kernel": (3, 3, 2, 3)}, {"spheres": [("*", fg.Each(fg.Sphere()))]})
    monkeypatch.setattr(updates, "NETWORKS", {"tiny": spheres})
    monkeypatch.setattr(kernels, "CASES", TINY)
    # Compile once.
    monkeypatch.setattr(versions, "LONG", 0.0)
    # The tests that follow have use for them.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return {name: Here() for name in versions.VERSIONS}


def test_versions(tiny_versions, record, tmp_path):
    here = tiny_versions["after"]
    assert here.ask("names") == ["tiny, spheres", *TINY, *(f"{case}, by maps" for case in TINY)]
    assert Path(here.ask("root")) == ROOT
    for case in ("tiny, spheres", "Ob(576, 512)", "Ob(576, 512), by maps"):
        row = versions.measured(case, tiny_versions, turns=3)
        before, after = (row["seconds"][name] for name in versions.VERSIONS)
        assert len(before) == len(after) == 3
        assert row["ratio"] == sorted(a / b for a, b in zip(after, before, strict=True))[1]
        assert row["median"]["after"] == sorted(after)[1]
        assert row["compile ratio"] == row["compile"]["after"] / row["compile"]["before"] > 0
        found = row["violation"]["after"]
        assert found is None if case != "Ob(576, 512)" else 0 < found < 1e-6
        record("versions").row(case, "fgsgd_jax", **row, commits={})
    written = json.loads((tmp_path / "here" / "versions.json").read_text())["rows"]
    assert all(set(row) >= FIELDS for row in written)
    # In the folder of a device it would be a part of bench.py.
    assert versions.RESULTS.parent == tables.RESULTS


def test_versions_without_a_floor_of_kernels(tiny_versions, monkeypatch):
    """Version 0.1: the same step by the manifolds' own maps, and `peers.py` can be imported."""
    here = tiny_versions["before"]
    here.ask("compile", "Ob(576, 512)")
    expected = here.child.program(*here.child.arguments)
    monkeypatch.delattr(fg, "kernels")
    monkeypatch.setitem(sys.modules, "fgsgd_jax.kernels", None)
    spec = importlib.util.spec_from_file_location("peers_of_0_1", peers.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    here.ask("compile", "Ob(576, 512)")
    np.testing.assert_allclose(here.child.program(*here.child.arguments), expected, atol=1e-6)


@pytest.mark.slow
def test_steps(record, tmp_path):
    arms = {"sgd": {"scheme": "euc"}, "fgsgd": {"scheme": "pio:sp+ob+st"}}
    steps.measure(record("steps"), {"ResNet-8": ("resnet8", arms)}, batch=4, size=8)
    rows, left = check("steps", tmp_path / "here")
    assert not left
    assert {row["name"] for row in rows} == {"sgd", "fgsgd", "update alone"}


def test_what_fails_or_finds_no_room_is_left_out_and_named(record, tmp_path):
    own = record("kernels", at_most=-1)
    with own.case("one", "two"):
        raise MemoryError("no room\nat all")
    assert not own.has_time("three")
    assert not own.has_memory("four", 1e18)
    left = json.loads((tmp_path / "here" / "kernels.json").read_text())["left out"]
    assert [each["case"] for each in left] == ["one", "three", "four"]
    assert left[0]["why"] == "MemoryError: no room"


@pytest.mark.parametrize("path", tables.TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_json(path):
    text = path.read_text()
    assert "<!-- cost " in text or "<!-- ratios " in text
    assert tables.filled(text) == text


def test_a_table_by_hand_is_found():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert tables.filled(text.replace("| St(512, 128) |", "| St(512, 129) |")) == text
