"""The command line on text: what it prints, what it compares and how it ends."""

import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

pytest.importorskip("tyro")
from fgsgd_jax.experiments import TextConfig
from fgsgd_jax.experiments.__main__ import main
from fgsgd_jax.experiments._compare import chosen_rate
from fgsgd_jax.experiments._comparison_report import asked, draw, report
from fgsgd_jax.experiments._paired import paired_difference
from fgsgd_jax.experiments._rows import check_rows, row_config, row_name, row_rates
from fgsgd_jax.experiments._text import TextKind

pytestmark = pytest.mark.usefixtures("users_promotion")

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--task", "text", "--data", "book.txt", "--layers", "1", "--width", "16", "--heads", "1", "--context", "16"]
SMALL += ["--batch-size", "4", "--steps", "6", "--report-every", "3", "--test-bytes", "160", "--warmup", "2"]
COMPARE = ["compare", *SMALL, "--rows", "adamw,muon", "--lrs", "0.3,1", "--seeds", "2", "--run-dir", "comparison"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "book.txt").write_bytes(b"the cat sat on the mat and the dog lay by the door; " * 60)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_with_a_book(place, monkeypatch):
    monkeypatch.chdir(place)


def test_train_prints_lines_and_a_paragraph_and_resumes_by_what_it_says(capsys, refused):
    main(["train", *SMALL, "--optimizer", "adamw"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("book.txt: 2,808 bytes of text to train on (1 file), 312 to test on")
    assert lines[1] == "held out: the last tenth of the file"
    assert lines[2].startswith("loss (nats a byte), error (of the likeliest byte): training text / held-out text")
    assert [line.split("  ")[0] for line in lines[3:5]] == ["step 3/6", "step 6/6"]
    assert all(len(line) <= 80 for line in lines[1:5])
    folder = "runs/book.txt-gpt1x16-adamw-euc-seed0"
    assert lines[-1].endswith(f"picture: {folder}/picture.png")
    said = refused("train", *SMALL, "--optimizer", "adamw")
    assert f"`fgsgd train --run-dir {folder} --resume`" in said
    log = pathlib.Path(folder, "metrics.jsonl").read_bytes()
    main(["train", "--run-dir", folder, "--resume"])
    assert "after step 6 of 6" in capsys.readouterr().out
    assert pathlib.Path(folder, "metrics.jsonl").read_bytes() == log
    assert "--momentum is 0.5, was 0.95" in refused("train", "--run-dir", folder, "--resume", "--momentum", "0.5")
    assert "has --schedule cosine, drawn over 6 steps" in refused(
        "train", "--run-dir", folder, "--resume", "--steps", "9"
    )
    assert "is of text; the bounds are those of networks for images" in refused("bounds", folder)
    assert "is of --task text; leave --task out" in refused(
        "train", "--task", "images", "--run-dir", folder, "--resume"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--task", "txt"], "unknown task 'txt': did you mean 'text'?"),
        (["compare", "--task=txt"], "unknown task 'txt'"),
        (["train", "--task", "text", "--data", "./nowhere"], "'./nowhere' does not exist"),
        (["train", *SMALL, "--held-out", "cook.txt"], "no file of 'book.txt' is called 'cook.txt'"),
        (["train", *SMALL, "--heads", "3"], "--width 16 cannot be shared out over 3 heads"),
        (["train", *SMALL, "--context", "400"], "too few for passages of --context 400"),
        (["compare", *SMALL, "--optimizer", "spel"], "--optimizer is no option of `fgsgd compare`: give --rows"),
        (["compare", *SMALL, "--rows", "adam"], "unknown optimizer in the row 'adam': 'adam': did you mean 'adamw'?"),
        (["compare", *SMALL, "--rows", "spel:head"], "did you mean 'heads'?"),
        (["compare", *SMALL, "--rows", "spel~tangent=no"], "row 'spel~tangent=no': tangent cannot be 'no'"),
        (["compare", *SMALL, "--rows", "spel,spel:stiefel"], "row 'spel' is named twice"),
        (["compare", *SMALL, "--validation", "0"], "--validation: give a share between 0 and 1"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, said, refused):
    assert said in refused(*arguments)


def options_in_help(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    return set(capsys.readouterr().out.split())


def test_help_is_of_its_task_alone(capsys):
    text = options_in_help(capsys, "train", "--task", "text")
    assert {"--optimizer", "--held-out", "--steps", "--context", "--resume", "--task"} <= text
    assert not {"--epochs", "--model", "--augment", "--lambda", "--report-bounds"} & text
    assert "--optimizer" not in options_in_help(capsys, "train")
    compare = options_in_help(capsys, "compare", "--task", "text")
    assert {"--rows", "--lrs", "--held-out", "--validation", "--steps"} <= compare
    assert not {"--optimizer", "--scheme", "--lr", "--seed", "--tangent", "--epochs"} & compare


def test_rows_have_one_name_and_their_optimizers_own_grid():
    base = TextConfig().check()
    assert row_name("spel:stiefel~weight-decay=0.50", base) == "spel~wd=0.5"
    assert {row_name(row, base) for row in TextKind.rows} == set(TextKind.rows)
    check_rows(TextKind.rows, base)
    assert row_rates((0.3, 1.0), "adamw", base) == (0.003, 0.01)
    assert row_rates((0.3, 1.0), "spel~tangent=off", base) == (0.015, 0.05)
    config = row_config("spel:heads~tangent=off", base)
    assert (config.optimizer, config.scheme, config.tangent, config.lr) == ("spel", "heads", "off", 0.05)


@pytest.mark.slow
def test_a_comparison_tunes_by_loss_reports_and_goes_on_where_it_was(place, refused, monkeypatch, capsys):
    main(COMPARE)
    found = json.loads((place / "comparison" / "results.json").read_text())
    text = (place / "comparison" / "report.md").read_text()
    command = re.search(r"```\n(.*)\n```", text)[1]
    assert command.startswith("fgsgd compare --task text --data book.txt ")
    assert report(found, command, "comparison.png") == text
    assert (place / "comparison" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    losses = {}
    for row, rates in (("adamw", (0.003, 0.01)), ("muon", (0.015, 0.05))):
        tests = [t for t in found["trainings"] if (t["row"], t["stage"]) == (row, "test")]
        tuned = {t["lr"]: t["loss"] for t in found["trainings"] if (t["row"], t["stage"]) == (row, "tuning")}
        assert set(tuned) == set(rates)
        assert (
            {t["lr"] for t in tests}
            == {min(tuned, key=tuned.get)}
            == {chosen_rate(rates, row, found["trainings"], "loss")}
        )
        losses[row] = np.array([t["loss"] for t in tests])
        assert f" | {losses[row].mean():.4f} ± {losses[row].std(ddof=1):.4f} | " in text
    assert f"| muon | {np.mean(losses['muon'] - losses['adamw']):+.4f} |" in text
    # All is there: the same command trains nothing more.
    trained = []
    monkeypatch.setattr("fgsgd_jax.experiments._compare._train", lambda *each: trained.append(each))
    main(COMPARE)
    assert not trained
    assert (place / "comparison" / "report.md").read_text() == text
    assert "holds another comparison (--momentum is 0.5, was 0.95)" in refused(*COMPARE, "--momentum", "0.5")
    (place / "book.txt").write_bytes((place / "book.txt").read_bytes()[::-1])
    assert "holds a comparison on other data (training text: 2808 with checksum" in refused(*COMPARE)


def test_a_losss_place_in_the_picture_is_the_middle_of_its_steps(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: places.append(figure.axes[0].lines[0].get_xdata()))
    training = {"row": "adamw", "stage": "test", "lr": 0.01, "seed": 0, "loss": 1.0, "train_loss": [3.0, 2.0, 1.0]}
    base = TextConfig(steps=10, report_every=4).to_dict()
    comparison = {"rows": ["adamw"], "lrs": [1.0], "seeds": 1, "base": base}
    draw({"comparison": comparison, "trainings": [training]}, tmp_path / "out.png")
    np.testing.assert_array_equal(places, [[2, 6, 9]])


def test_the_findings_quote_the_published_comparisons():
    results = ROOT / "benchmarks" / "results"
    section = re.search(r"\{#text\}\n(.*?)\n## ", (ROOT / "docs" / "findings.md").read_text(), re.DOTALL)[1]
    table = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    trainings = [
        asked(json.loads((results / f"compare_text_{name}" / "results.json").read_text()))
        for name in ("austen", "stdlib")
    ]
    times = json.loads((results / "text_steps.json").read_text())["milliseconds"]

    def losses(corpus, row):
        tests = (t for t in corpus if (t["row"], t["stage"]) == (row, "test"))
        return np.array([t["loss"] for t in sorted(tests, key=lambda t: t["seed"])])

    def compared(corpus, row, reference):
        found = paired_difference(losses(corpus, row), losses(corpus, reference))
        return f"{found.mean:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]".replace("-", "−")

    means, differences = [], []
    for first, second, *_ in table:
        row = first.strip("`")
        if second.startswith("`"):
            pairs = [compared(corpus, row, second.strip("`")) for corpus in trainings]
            differences.append([first, second, *pairs])
        else:
            time = f"{times[row]:.0f}" if row in times else "—"
            means.append([first, *(f"{losses(corpus, row).mean():.3f}" for corpus in trainings), time])
    assert table == means + differences
    assert {row.strip("`") for row, *_ in means} == {t["row"] for t in trainings[0]} == {t["row"] for t in trainings[1]}
    assert set(times) <= {row.strip("`") for row, *_ in means}
    assert len(differences) == 22
