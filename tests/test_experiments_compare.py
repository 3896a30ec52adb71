"""`fgsgd compare`: what it trains, what it chooses, what it says, and that it goes on where it was."""

import json
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

pytest.importorskip("tyro")
import datasets
import PIL.Image
from trainings import tiny

from fgsgd_jax.experiments import TrainConfig, _compare
from fgsgd_jax.experiments.__main__ import main
from fgsgd_jax.experiments._augment import resolve
from fgsgd_jax.experiments._compare import chosen_rate
from fgsgd_jax.experiments._comparison_report import draw, report
from fgsgd_jax.experiments._image_kind import ImageKind
from fgsgd_jax.experiments._models import REGISTRY
from fgsgd_jax.experiments._paired import paired_difference
from fgsgd_jax.experiments._rows import row_config, row_name

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
TINY = ["--limit-train", "80", "--limit-test", "32", "--batch-size", "32", "--epochs", "2", "--model", "tiny"]
COMPARE = ["compare", *TINY, "--rows", "euc,po3", "--lrs", "0.01,0.1", "--seeds", "2", "--tuning-seeds", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "tiny", tiny)
        main([*COMPARE, "--run-dir", str(folder)])
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_row_is_tuned_on_the_grid_and_tested_with_the_same_seeds(folder):
    found = results(folder)
    trainings = found["trainings"]
    for row in ("euc", "po3"):
        tuning = [(t["lr"], t["seed"]) for t in trainings if (t["row"], t["stage"]) == (row, "tuning")]
        tests = [t for t in trainings if (t["row"], t["stage"]) == (row, "test")]
        assert sorted(lr for lr, _ in tuning) == [0.01, 0.1]
        assert [t["seed"] for t in tests] == [0, 1]
        assert not {seed for _, seed in tuning} & {0, 1}
        assert {t["lr"] for t in tests} == {chosen_rate((0.01, 0.1), row, trainings)}
        assert all(len(t["train_loss"]) == 2 for t in tests)
    assert all(t["violation"] <= 1e-6 for t in trainings if t["row"] == "po3")


def test_the_report_is_made_of_the_results_alone(folder):
    found, text = results(folder), (folder / "report.md").read_text()
    command = re.search(r"```\n(.*)\n```", text)[1]
    assert command.startswith("fgsgd compare ")
    assert report(found, command, "comparison.png") == text
    errors = {
        row: [t["error"] for t in found["trainings"] if (t["row"], t["stage"]) == (row, "test")]
        for row in ("euc", "po3")
    }
    for row, values in errors.items():
        assert f"| {row} | " in text
        assert f" | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} | " in text
    assert f"| po3 | {np.mean(errors['po3']) - np.mean(errors['euc']):+.2f} |" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kept", sorted(RESULTS.glob("*/report.md")), ids=lambda path: path.parent.name)
def test_every_figure_of_a_published_report_follows_from_its_results(kept):
    text = kept.read_text()
    command = re.search(r"```\n(.*)\n```", text)[1]
    assert report(results(kept.parent), command, "comparison.png") == text


def test_an_interrupted_comparison_goes_on_where_it_was(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(REGISTRY, "tiny", tiny)
    found = results(folder)
    there = tmp_path / "run"
    there.mkdir()
    kept = [t for t in found["trainings"] if (t["row"], t["seed"]) != ("po3", 1)]
    # As a version that knew fewer options left it.
    base = {name: value for name, value in found["comparison"]["base"].items() if name not in ("zeta", "clip")}
    (there / "results.json").write_text(
        json.dumps(found | {"comparison": found["comparison"] | {"base": base}, "trainings": kept})
    )
    (kept_error,) = (t["error"] for t in kept if (t["row"], t["stage"], t["seed"]) == ("po3", "test", 0))
    trained, train = [], _compare._train

    def counted(*arguments):
        trained.append(arguments[1:])
        return train(*arguments)

    monkeypatch.setattr(_compare, "_train", counted)
    main([*COMPARE, "--run-dir", str(there)])
    assert trained == [(chosen_rate((0.01, 0.1), "po3", kept), 1)]

    def sorted_without_times(found):
        return sorted(
            json.dumps({k: v for k, v in t.items() if "seconds" not in k}, sort_keys=True) for t in found["trainings"]
        )

    assert sorted_without_times(results(there)) == sorted_without_times(found)
    assert "holds another comparison (--epochs is 3, was 2)" in refused(*COMPARE, "--epochs", "3", "--run-dir", there)
    # Rows and seeds may be others: a report of fewer is one of what is there.
    main(
        [
            "compare",
            *TINY,
            "--rows",
            "po3",
            "--lrs",
            "0.01,0.1",
            "--seeds",
            "1",
            "--tuning-seeds",
            "1",
            "--run-dir",
            str(there),
        ]
    )
    assert len(trained) == 1
    text = (there / "report.md").read_text()
    assert "1 rows, 1 seeds" in text
    assert "euc" not in text.split("```")[2]
    assert f"| po3 | {chosen_rate((0.01, 0.1), 'po3', kept):g} | {kept_error:.2f} |" in text
    (there / "results.json").write_text("{")
    assert "cannot be read" in refused(*COMPARE, "--run-dir", there)


def folder_of(root, classes, seed):
    """Images of 8×8 in a folder each, called `fashion` whatever is in them."""
    rng = np.random.default_rng(seed)
    for split, each in (("train", 40), ("test", 8)):
        for name in classes:
            (root / "fashion" / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 256, (8, 8), np.uint8)
                PIL.Image.fromarray(pixels).save(root / "fashion" / split / name / f"{number}.png")
    return str(root / "fashion")


def test_results_go_by_the_content_of_their_data_and_not_by_its_folders_name(tmp_path, monkeypatch, refused, capsys):
    monkeypatch.setitem(REGISTRY, "tiny", tiny)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(_compare, "_train", lambda trainer, lr, seed: trained(lr, seed))
    there = tmp_path / "it's here"
    options = ["--model", "tiny", "--batch-size", "32", "--epochs", "2", "--seeds", "2", "--tuning-seeds", "1"]
    compare = ["compare", *options, "--lrs", "0.01,0.1", "--run-dir", str(there)]
    one, other = folder_of(tmp_path / "one", ["a", "b"], 0), folder_of(tmp_path / "other", ["a", "b"], 1)
    main([*compare, "--data", one, "--rows", "euc"])
    before = (there / "results.json").read_bytes()

    said = refused(*compare, "--data", other, "--rows", "euc,st")
    assert "holds a comparison on other data (training images: 80×8×8×1 with checksum" in said
    assert (there / "results.json").read_bytes() == before
    fewer = folder_of(tmp_path / "fewer", ["a", "b", "c"], 2)
    assert "classes: 3 (a, b, c), was 2 (a, b)" in refused(*compare, "--data", fewer, "--rows", "euc,st")

    # The same images elsewhere, under another name.
    shutil.copytree(one, tmp_path / "moved")
    main([*compare, "--data", str(tmp_path / "moved"), "--rows", "euc,st"])
    assert len(results(there)["trainings"]) == 8
    text = (there / "report.md").read_text()
    assert f"checksum {results(there)['data']['train']['crc32']:08x}" in text

    # The command of the report runs as printed, and finds that everything is there.
    command = shlex.split(re.search(r"```\n(.*)\n```", text)[1])
    monkeypatch.setattr(_compare, "_train", lambda *_: pytest.fail("trains again"))
    main(command[1:])
    assert (there / "report.md").read_text() == text

    # As the versions before this one left it.
    old = {name: value for name, value in results(there).items() if name != "data"}
    (there / "results.json").write_text(json.dumps(old))
    assert "have no checksum of their data" in refused(*compare, "--data", one, "--rows", "euc,st")


def trained(lr, seed):
    return {"error": 10 * lr + seed % 10, "loss": lr, "train_loss": [1.0, lr], "train_error": [9.0, lr], "seconds": 1.0}


def test_a_rows_grid_is_widened_while_its_best_rate_is_at_an_end(tmp_path, monkeypatch, refused):
    def valley(trainer, lr, seed):
        best = 0.02 if trainer.config.scheme == "euc" else 2.0
        return trained(lr, seed) | {"error": 50 + abs(np.log10(lr / best)), "loss": 1.0}

    monkeypatch.setitem(REGISTRY, "tiny", tiny)
    monkeypatch.setattr(_compare, "_train", valley)
    there = tmp_path / "run"
    compare = ["compare", *TINY, "--rows", "euc,po3", "--lrs", "0.1,0.3", "--seeds", "1", "--tuning-seeds", "1"]
    compare += ["--run-dir", str(there)]

    def tried(row, stage):
        return [t["lr"] for t in results(there)["trainings"] if (t["row"], t["stage"]) == (row, stage)]

    main([*compare, "--widen", "1"])
    assert (tried("euc", "tuning"), tried("po3", "tuning")) == ([0.1, 0.3, 0.0333333], [0.1, 0.3, 0.9])
    narrower = (there / "report.md").read_text()
    main([*compare, "--widen", "5"])
    assert tried("euc", "tuning") == [0.1, 0.3, 0.0333333, 0.0111111]
    assert tried("po3", "tuning") == [0.1, 0.3, 0.9, 2.7, 8.1]
    # Tests at the best rate of a narrower grid are kept, and belong to its report alone.
    assert (tried("euc", "test"), tried("po3", "test")) == ([0.0333333], [0.9, 2.7])
    text = (there / "report.md").read_text()
    assert "and up to 5 more beyond an end at which the best lay" in text
    assert "| row | 0.0111111 | 0.0333333 | 0.1 | 0.3 | 0.9 | 2.7 | 8.1 |" in text
    assert re.search(r"\| po3 \| 2.7 \| 50.13 \|", text)
    assert re.search(r"\| po3 \| — \| — \| 51.30 ", text)
    main([*compare, "--widen", "1"])
    assert (there / "report.md").read_text() == narrower
    assert "--widen: give a whole number of 0 or more" in refused(*compare, "--widen", "-1")


def test_trainings_under_other_versions_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "tiny", tiny)
    monkeypatch.setattr(_compare, "_train", lambda trainer, lr, seed: trained(lr, seed))
    compare = ["compare", *TINY, "--lrs", "0.1", "--seeds", "1", "--run-dir", str(tmp_path / "run")]
    main([*compare, "--rows", "euc"])
    first = results(tmp_path / "run")["versions"]
    monkeypatch.setattr(_compare, "versions", lambda: first | {"jax": "99.0"})
    main([*compare, "--rows", "euc,st"])
    found = results(tmp_path / "run")
    assert found["versions"] == first
    assert [t.get("versions", {}).get("jax") for t in found["trainings"]] == [None, "99.0"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert re.search(r"Trainings of st in part: .*jax 99\.0", text)


def test_a_folder_called_digits_is_no_digits():
    assert resolve("auto", "digits") == "crop"
    assert resolve("auto", "photos/digits") == "crop-flip"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "euc,stt"], "unknown scheme 'stt': did you mean 'st'?"),
        (["--rows", "pio:sp+stiefel"], "'stiefel': did you mean 'st'?"),
        (["--rows", "pio3,pio:sp+ob+st"], "row 'pio3' is named twice"),
        (["--rows", "euc,euc~weight-decay=0.0005"], "rows 'euc' and 'euc~wd=0.0005' are one"),
        (["--rows", "euc~wd=1~weight-decay=2"], "changes wd twice"),
        (["--scheme", "st"], "--scheme is no option of `fgsgd compare`: give --rows"),
        (["--seed=3"], "--seed is no option of `fgsgd compare`: give --seeds"),
        (["--rows", "euc,euc"], "row 'euc' is named twice"),
        (["--rows", "euc~decay=1"], "did you mean 'wd'? write ~option=value with an option of wd"),
        (["--rows", "euc~wd=-1"], "--weight-decay -1.0"),
        (["--rows", "euc~wd=much"], "wd cannot be 'much'"),
        (["--rows", "st~zeta=of"], "zeta cannot be 'of': did you mean 'off'? there are on, late, off, clip"),
        (["--lrs", "0.1,x"], "give numbers separated by commas"),
        (["--lrs", "0.1,0.1"], "give different numbers above 0"),
        (["--seeds", "0"], "give a whole number of 1 or more"),
        (["--held-out", "1"], "give a share between 0 and 1"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, said, refused, tmp_path):
    assert said in refused("compare", *arguments, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_change_what_they_say_and_nothing_else():
    base = TrainConfig()
    assert row_config("pio4", base).scheme == "pio:sp+ob+st+euc"
    changed = row_config("euc~wd=0.005~momentum=0.5", base)
    assert (changed.scheme, changed.weight_decay, changed.momentum) == ("euc", 0.005, 0.5)
    assert row_config("pio3~gamma=literal~lambda=epoch", base).lambda_ == "epoch"
    changed = row_config("st~zeta=clip~pooling=pio~clip=0.5", base)
    assert (changed.zeta, changed.pooling, changed.clip) == ("clip", "pio", 0.5)
    assert base.difference(row_config("pio3", base)) is None
    assert row_name("pio:sp+ob+st~weight-decay=5e-3~zeta=off") == "pio3~wd=0.005~zeta=off"
    assert {row_name(row) for row in ImageKind.rows} == set(ImageKind.rows)
    # Whatever a training may be called, a row may be.
    for name in (*ImageKind.rows, "po4", "pi:st+euc"):
        config = TrainConfig(scheme=name).check()
        assert config == row_config(row_name(name), base)
        assert config.scheme == TrainConfig(scheme=config.scheme).check().scheme
    assert len({row_config(row, base).scheme for row in ImageKind.rows}) == len(ImageKind.rows)


def test_paired_differences():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 10, 12)
    x, y = common + rng.normal(0, 1, 12) + 6, common + rng.normal(0, 1, 12)
    found = paired_difference(x, y)
    assert found.mean == pytest.approx(np.mean(x - y))
    # The seeds' common part, of deviation 10, does not widen the interval.
    assert found.lower < found.mean < found.upper
    assert found.upper - found.lower < 3
    assert found.p == pytest.approx(2 / 2**12)
    nothing = paired_difference(y, y)
    assert (nothing.mean, nothing.p) == (0, 1)
    # Five pairs: all 2⁵ signs.
    assert paired_difference(np.arange(1.0, 6.0), np.zeros(5)).p == pytest.approx(2 / 32)
    swapped = paired_difference(y, x)
    assert swapped.mean == pytest.approx(-found.mean)
    assert np.isnan(paired_difference(x[:1], y[:1]).lower)


def test_a_rate_that_diverges_is_not_chosen():
    def tried(lr, error, loss):
        return {"row": "euc", "stage": "tuning", "lr": lr, "seed": 7, "error": error, "loss": loss}

    results = [tried(0.1, 50.0, 1.0), tried(0.3, 50.0, None), tried(0.03, 60.0, 0.5)]
    assert chosen_rate((0.3, 0.1, 0.03), "euc", results) == 0.1
    assert chosen_rate((0.5,), "euc", []) == 0.5


@pytest.mark.parametrize(
    ("errors", "lowest"),
    [([3.0, 0.0], 0), ([70.0, 44.0], 20), ([100.0, 100.0], 50), ([90.0, None], 50), ([None, None], 0)],
)
def test_the_picture_reaches_down_to_the_rows(errors, lowest, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: limits.append(figure.axes[0].get_ylim()))
    training = {"row": "euc", "stage": "test", "lr": 0.1, "seed": 0, "error": 50.0, "train_error": errors}
    comparison = {"rows": ["euc"], "lrs": [0.1], "seeds": 1, "base": TrainConfig().to_dict()}
    draw({"comparison": comparison, "trainings": [training]}, tmp_path / "picture.png")
    assert limits == [(lowest, 100)]
