"""`fgsgd bounds`, `--correlate` and `train --report-bounds`, and what they are made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

pytest.importorskip("tyro")

from matplotlib.figure import Figure
from trainings import network

import fgsgd_jax as fg
from fgsgd_jax.bounds import Chain, GeneralizationBounds, LogBounds, Sum
from fgsgd_jax.experiments import TrainConfig, Trainer, _run, build, load
from fgsgd_jax.experiments.__main__ import main
from fgsgd_jax.experiments._bounds_picture import draw_bounds
from fgsgd_jax.experiments._commands import _bounds
from fgsgd_jax.experiments._correlation import spearman
from fgsgd_jax.experiments._log import MetricsLog
from fgsgd_jax.experiments._measures import Measurer, Measures, geometries, structure
from fgsgd_jax.experiments._models import REGISTRY, _nnx_resnet

TINY = ["--limit-train", "64", "--limit-test", "48", "--batch-size", "32", "--epochs", "1", "--model", "tiny"]

# Three convolutions, and residual blocks with a shortcut between widths.
tiny = network(_nnx_resnet.PlainNet, 1, 4)
tiny_residual = network(_nnx_resnet.CifarResNet, 1, 3, 6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, one on manifolds with its bounds logged, and the trainers that made them."""
    folder, compiled = tmp_path_factory.mktemp("runs"), {}

    def trainer(config, data):
        return compiled.setdefault(config, None) or compiled.update({config: Trainer(config, data)}) or compiled[config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "tiny", tiny)
        patch.setattr(_run, "Trainer", trainer)
        patch.setattr(_bounds, "Trainer", trainer)
        main(["train", *TINY, "--scheme", "po:sp+st", "--run-dir", str(folder / "po"), "--report-bounds"])
        main(["train", *TINY, "--scheme", "euc", "--lr", "0.01", "--run-dir", str(folder / "euc")])
        yield folder


# --- the commands


@pytest.mark.slow
def test_a_run_is_reported_in_tables_and_a_picture(runs, capsys, tmp_path):
    main(["bounds", str(runs / "po")])
    out = capsys.readouterr().out
    assert out.startswith("tiny, po:sp+st, digits, step 2")
    for said in ("Frobenius", "circular", "certified", "Neyshabur 2015", "own papers", "Lipschitz bound", "often fail"):
        assert said in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("picture"))
    picture = runs / "po" / "bounds.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    # The same figures that the training logged.
    _, records = MetricsLog(runs / "po" / "metrics.jsonl").read()
    _, _, measures = _bounds.measured(runs / "po", None)
    logged, now = records[-1]["bounds"], measures.record()
    assert logged["certified"] == now["certified"]
    assert logged["log_lipschitz"] == pytest.approx(now["log_lipschitz"], rel=1e-6)
    assert logged["test_error"] == records[-1]["test"]["error"] == now["test_error"]

    # One of its checkpoints, and a picture elsewhere.
    main(["bounds", str(runs / "po" / "checkpoints" / "2"), "--picture", str(tmp_path / "other.png")])
    assert (tmp_path / "other.png").exists()


@pytest.mark.slow
def test_the_baseline_has_nothing_to_certify(runs, capsys, tmp_path):
    main(["bounds", str(runs / "euc"), "--picture", str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    assert "no weight is constrained" in out
    assert "≤ ∞" in out
    assert "bounds" not in MetricsLog(runs / "euc" / "metrics.jsonl").read()[1][-1]


@pytest.mark.slow
def test_correlation_over_runs(runs, capsys, tmp_path):
    """A third run is a copy of the first with another name and gap."""
    copy = tmp_path / "copy"
    copy.mkdir()
    header, records = MetricsLog(runs / "po" / "metrics.jsonl").read()
    bounds = records[-1]["bounds"]
    papers = {name: value and value - 1.0 for name, value in bounds["log"]["papers"].items()}
    changed = bounds | {"gap": bounds["gap"] - 50, "log": bounds["log"] | {"papers": papers}}
    MetricsLog(copy / "metrics.jsonl").create(header)
    MetricsLog(copy / "metrics.jsonl").append(records[-1] | {"bounds": changed})
    main(["bounds", "--correlate", str(runs / "po"), str(runs / "euc"), str(copy)])
    out = capsys.readouterr().out
    assert f"{bounds['gap']:.2f}" in out
    assert f"{bounds['gap'] - 50:.2f}" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("Lipschitz bound"))
    assert row.split()[-1] == "3"
    assert -1 <= float(row.split()[2]) <= 1


@pytest.mark.slow
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(runs, refused, tmp_path):
    for arguments, said in (
        ([], "give either a run directory"),
        ([tmp_path], "neither the directory of a run"),
        ([runs / "po" / "checkpoints" / "7"], "neither the directory of a run"),
        ([runs / "po", "--picture", tmp_path / "no" / "p.png"], "there is no folder"),
        (["--correlate", runs / "po", runs / "euc"], "needs 3 or more runs"),
        (["--correlate", runs / "po", runs / "euc", runs / "po"], "names a run twice"),
        ([runs / "po", "--correlate", runs / "po"], "give either"),
    ):
        assert said in refused("bounds", *arguments)
    bare = tmp_path / "bare"
    bare.mkdir()
    MetricsLog(bare / "metrics.jsonl").create({"config": TrainConfig().to_dict()})
    assert "has no checkpoint yet" in refused("bounds", bare)
    assert not (bare / "checkpoints").exists()


def test_runs_are_told_apart_by_content(refused, tmp_path):
    """The same training under another name, of itself and of its data, is the same run, copied or made again; gaps of
    other test images are other gaps.
    """
    data = {"train": {"shape": [64], "crc32": 1}, "test": {"shape": [48], "crc32": 2}, "classes": ["a", "b"]}
    record = {"epoch": 1, "step": 2, "train": {"loss": 1.0, "error": 9.0}, "test": {"loss": 1.0, "error": 9.0}}

    def logged(name, seed, data, **more):
        (tmp_path / name).mkdir()
        header = {"config": TrainConfig(seed=seed, data=name).to_dict()} | ({} if data is None else {"data": data})
        MetricsLog(tmp_path / name / "metrics.jsonl").create(header)
        MetricsLog(tmp_path / name / "metrics.jsonl").append(record | {"norms": {}} | more)
        return tmp_path / name

    one, two = logged("one", 0, data), logged("two", 1, data | {"train": {"shape": [32], "crc32": 7}})
    again = logged("again", 0, data, seconds={"train": 2.0})
    assert "are one training" in refused("bounds", "--correlate", one, two, again)
    copy, other = logged("copy", 0, data), logged("other", 2, data | {"test": {"shape": [48], "crc32": 3}})
    assert "names a run twice" in refused("bounds", "--correlate", one, two, copy)
    said = refused("bounds", "--correlate", one, two, other)
    assert "was not tested on the images that" in said
    assert "test images: 48 with checksum 00000003, was 48 with checksum 00000002" in said
    assert "no checksum of its data" in refused("bounds", "--correlate", one, two, logged("old", 3, None))


# --- what they are made of


def test_geometries_reproduce_the_networks_convolutions():
    model = build("resnet8", 10, 3)
    found = geometries(model, (16, 16, 3))
    assert list(found)[:2] == ["stem/kernel", "stage_0/block_0/conv_0/kernel"]
    assert found["stage_1/block_0/conv_0/kernel"] == fg.ConvGeometry((16, 16), strides=2, padding=1)
    assert found["stage_2/block_0/conv_1/kernel"] == fg.ConvGeometry((4, 4), padding=1)
    assert geometries(build("linen-resnet8", 10, 3), (16, 16, 3)) == found


def test_structures_of_the_networks():
    shapes = {}
    for name in ("plain8", "resnet8", "resnet50", "seresnet8"):
        model = build(name, 10, 3)
        params, _ = jax.eval_shape(model.init, jax.random.key(0))
        shapes[name] = structure(geometries(model, (32, 32, 3)), params)
    plain, small, large, gated = shapes.values()
    assert plain.parts == (*(f"conv_{i:03d}/kernel" for i in range(7)), 1 / 8, "head/kernel")
    assert [type(part) for part in small.parts] == [str, Sum, Sum, Sum, float, str]
    assert small.parts[1].branches[0] == 1
    assert large.parts[:2] == ("stem/kernel", 2.0)
    assert large.parts[2].branches[0] == "stage_0/block_0/shortcut_conv/kernel"
    assert isinstance(large.parts[2].branches[1], Chain)
    assert len(large.parts[2].branches[1].parts) == 3
    assert large.parts[-2] == 1.0
    assert gated is None


@pytest.mark.slow
def test_the_bound_of_a_network_with_batch_normalization_is_never_exceeded(monkeypatch):
    """By gradients at images and between pairs of images, with scales and variances that are not those of the start."""
    monkeypatch.setitem(REGISTRY, "tiny-residual", tiny_residual)
    config = TrainConfig(model="tiny-residual", scheme="euc", batch_size=16, epochs=1)
    trainer = Trainer(config, load("digits", limit_train=16, limit_test=16))
    model = build("tiny-residual", 10, 1)
    state = trainer.start(0)
    rng = np.random.default_rng(0)

    def shaken(path, leaf):
        name = jax.tree_util.keystr(path)
        return (
            jnp.asarray(np.asarray(leaf) * rng.uniform(0.2, 1, leaf.shape), leaf.dtype)
            if "var" in name or "scale" in name
            else leaf
        )

    state = state._replace(
        params=jax.tree_util.tree_map_with_path(shaken, state.params),
        stats=jax.tree_util.tree_map_with_path(shaken, state.stats),
    )
    measures = Measurer(trainer, state.params)(state, None)
    bound = math.exp(measures.log_lipschitz)

    def scores(x):
        return model.apply(state.params, state.stats, x, False, False)[0]

    images = jnp.asarray(rng.standard_normal((6, 8, 8, 1)), jnp.float32)
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda x: scores(x[None])[0])))(images).reshape(6, 10, -1)
    largest = np.linalg.norm(np.asarray(jacobians), 2, (1, 2)).max()
    assert bound / 1e4 < largest <= bound
    difference = np.asarray(scores(images[:3]) - scores(images[3:]))
    distance = np.asarray(images[:3] - images[3:]).reshape(3, -1)
    assert np.all(np.linalg.norm(difference, axis=1) <= bound * np.linalg.norm(distance, axis=1))


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys_with_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 12).astype(float), rng.standard_normal(12)
    y += 0.5 * x
    found = spearman(x, y)
    assert found.rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.lower <= found.rho <= found.upper


def test_spearmans_interval_covers_and_infinite_bounds_have_a_rank():
    truth, covered = 6 / math.pi * math.asin(0.6 / 2), 0
    for seed in range(60):
        x, y = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 30).T
        found = spearman(x, y, seed)
        covered += found.lower <= truth <= found.upper
    assert covered >= 50
    assert spearman(np.array([1.0, 2.0, math.inf]), np.array([0.0, 1.0, 2.0])).rho == pytest.approx(1)
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)).rho)


@pytest.mark.parametrize(("margin", "said"), [(-0.25, "margin γ = -0.25 is not above 0"), (0.5, None)])
def test_bars_without_an_end_say_so(margin, said, tmp_path, monkeypatch):
    endless = LogBounds(math.inf, math.inf, math.inf)
    found = LogBounds(1.0, 2.0, 3.0)
    bounds = GeneralizationBounds(found, found, endless if said else found, margin, 0.1)
    measures = Measures({}, {}, None, None, bounds, 0.0, 10.0)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: None)
    draw_bounds(measures, "title", tmp_path / "bounds.png")
    bars = drawn[0].axes[-1]
    words = [text.get_text() for text in bars.texts]
    assert "inf" not in words
    assert words.count("∞") == (3 if said else 0)
    assert (said or "") in bars.get_xlabel()
    if said:
        assert {bar.get_hatch() for bar in bars.patches} == {None, "///"}
        assert all(bar.get_height() > 0 for bar in bars.patches)
