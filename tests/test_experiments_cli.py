"""The command line: what it prints, what it leaves behind and how it ends."""

import builtins
import dataclasses
import io
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("tyro")
import orbax.checkpoint as ocp
import tyro
from matplotlib.colors import to_rgb
from rich.console import Console

from fgsgd_jax.experiments import TrainConfig, Trainer, _config, _run, load
from fgsgd_jax.experiments.__main__ import main
from fgsgd_jax.experiments._commands import COMMANDS, _demo
from fgsgd_jax.experiments._commands._compare import Compare
from fgsgd_jax.experiments._commands._train import Train
from fgsgd_jax.experiments._demo_picture import MANIFOLD_COLOURS, tiles
from fgsgd_jax.experiments._log import MetricsLog
from fgsgd_jax.experiments._paired import paired_difference
from fgsgd_jax.experiments._progress import ProgressDisplay, epoch_line, legend
from fgsgd_jax.experiments._rows import check_rows, row_config
from fgsgd_jax.experiments._state import Glance, Totals, Zeta
from fgsgd_jax.experiments._tasks import CONFIGS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = ["--limit-train", "64", "--limit-test", "32", "--batch-size", "32", "--epochs", "1", "--scheme", "euc"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def compiled():
    """One trainer for all command lines of the same options: what is compiled is not what is tested here."""
    return {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch, compiled):
    def trainer(config, data):
        if config not in compiled:
            compiled[config] = Trainer(config, data)
        return compiled[config]

    monkeypatch.setattr(_run, "Trainer", trainer)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "./nowhere"], "data folder './nowhere' does not exist"),
        (["--model", "resnet21"], "unknown model 'resnet21': did you mean 'resnet"),
        (["--scheme", "pio:sp+stiefel"], "unknown manifold in the scheme 'pio:sp+stiefel'"),
        (["--scheme", "fgsgd"], "unknown scheme 'fgsgd'"),
        (["--scheme", "Stiefel"], "unknown scheme 'Stiefel': did you mean 'st'?"),
        (["--scheme", "pioo:sp+st"], "unknown scheme 'pioo:sp+st': did you mean 'pio:sp+st'?"),
        (["--batch-size", "2000"], "--batch-size 2000 is more than the 1000 training images"),
        (["--lr", "-1"], "--lr -1.0: give a number above 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: give a whole number"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, said, refused, tmp_path):
    assert said in refused("train", *arguments)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_plan_that_cannot_be_made_names_the_path(refused, monkeypatch):
    def plan(*_, **__):
        raise ValueError("stage_0/block_0/conv_0/kernel: no such luck")

    monkeypatch.setattr("fgsgd_jax.plan", plan)
    said = refused("train", "--model", "resnet14")
    assert "scheme 'pio:sp+ob+st' does not fit model 'resnet14': stage_0/block_0/conv_0/kernel" in said


@pytest.mark.parametrize("arguments", [[], ["tarin"], ["train", "--epochs", "many"], ["train", "--no-such-option"]])
def test_a_line_that_cannot_be_read_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_misspelled_command_is_one_line(refused):
    assert "unknown command 'tarin': did you mean 'train'?" in refused("tarin")


def options_in_help(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_is_of_its_command_alone(capsys):
    out = options_in_help(capsys)
    assert {"train", "demo"} <= set(out.split())
    assert "--lr" not in out
    train, compare = (set(options_in_help(capsys, name).split()) for name in ("train", "compare"))
    assert {"--scheme", "--lr", "--seed", "--validation", "--resume", "--data"} <= train
    assert not {"--rows", "--lrs", "--seeds"} & train
    assert {"--rows", "--lrs", "--seeds", "--held-out", "--data", "--epochs"} <= compare
    # Options that a row, a rate of the grid or a number of seeds stands for here.
    assert not {"--scheme", "--lr", "--seed", "--validation", "--resume"} & compare


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS, "train --task text", "compare --task text"])
def test_help_breaks_lines_only_where_they_are_full(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = options_in_help(capsys, *command.split()).splitlines()
    assert max(map(len, lines)) <= columns
    assert "pyright" not in "".join(lines)
    # Of an option that is not set when left out, the help says so in words.
    assert not re.search(r"default:[│\s]*(None|False|''|\))", "".join(lines))
    for line, following in itertools.pairwise(line.strip("│").rstrip() for line in lines):
        column = len(following) - len(following.lstrip())
        # A line of help below another: not below an option's name.
        if column > 4 and line[column - 2 : column] == "  " and line[column:].strip():
            # The box and its margins take four columns, two of them on the right.
            assert len(line) + 1 + len(following.split()[0]) > columns - 3, (line, following)


def test_one_vocabulary_for_schemes(tmp_path):
    """The same training under two names has one folder and one plan."""
    short, full = (Train(TrainConfig(scheme=name)) for name in ("pio3", "pio:sp+ob+st"))
    assert short.folder() == full.folder()
    assert short.config.check() == full.config.check()
    assert TrainConfig(scheme="pio3").difference(TrainConfig()) is None


def commands_of(page):
    """The command lines in a page's blocks, without what is said behind them and before them."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [match[1] for line in lines if (match := re.match(r"(?:[A-Z_]+=\S+ )*fgsgd (?!demo\b)(.*)", line))]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_command_of_the_pages_can_be_read(page):
    for command in commands_of(page):
        name, *options = shlex.split(command, comments=True)
        if name not in COMMANDS:
            continue  # what the terminal says, which begins like a command
        read = tyro.cli(COMMANDS[name].of(options), args=options)
        if isinstance(read, Compare):
            check_rows(read.rows.split(","), CONFIGS[read.config.task]())
        elif isinstance(read, Train):
            read.config.check()


def test_train_prints_lines_resumes_and_never_overwrites(capsys, refused, tmp_path):
    main(["train", *TINY])
    folder = tmp_path / "runs" / "digits-resnet8-euc-seed0"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: 64 training and 32 test images, 8×8 grey, 10 classes"
    assert lines[1] == "augmentation: random crops"
    assert lines[2].startswith("loss, error: of the epoch's training images")
    assert lines[3].startswith("epoch 1/1  loss ")
    assert lines[-1].endswith("picture: runs/digits-resnet8-euc-seed0/picture.png")
    assert all(len(line) <= 80 for line in lines[:-1])
    assert (folder / "picture.png").exists()
    log = (folder / "metrics.jsonl").read_bytes()

    said = refused("train", *TINY)
    assert "already holds something" in said
    assert "`fgsgd train --run-dir runs/digits-resnet8-euc-seed0 --resume`" in said
    # Options left out are the run's own; the run is over, and stays as it is.
    main(["train", "--resume", "--run-dir", str(folder)])
    assert f"resuming the run in {folder} after step 2 of 2" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == log
    said = refused("train", "--resume", "--run-dir", str(folder), "--momentum", "0.8")
    assert "--momentum is 0.8, was 0.9" in said
    # The cosine of two epochs is no beginning of another.
    said = refused("train", "--resume", "--run-dir", str(folder), "--epochs", "2")
    assert "--schedule cosine, drawn over 1 epochs" in said
    assert "--schedule constant" in said
    assert (folder / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("name", ["train", "compare", "demo"])
@pytest.mark.parametrize("task", CONFIGS)
def test_no_two_options_are_one_to_tyro(name, task, monkeypatch):
    """Its cache holds (Any, 0) and (Any, 0.0) for one key. Beside pytest it checks a tenth of the hits: here, all."""
    monkeypatch.setattr("random.random", lambda: 0.0)
    kind = COMMANDS[name].of(["--task", task])
    tyro.cli(kind, default=tyro.cli(kind, args=[]), args=[])


def test_gamma_is_a_word_or_a_number():
    for text, value in (("glorot", "glorot"), ("0.5", 0.5)):
        assert tyro.cli(TrainConfig, args=["--gamma", text]).gamma == value


def test_a_missing_package_is_named_with_its_remedy(refused, monkeypatch):
    imported = builtins.__import__

    def without_tyro(name, *arguments, **keywords):
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    assert "'tyro' is missing: in a checkout, pip install '.[experiments]'" in refused("train")


def test_an_interruption_names_its_remedy(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def interrupted(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["train", *TINY, *arguments])
        assert ended.value.code == 130
        return capsys.readouterr().err

    with monkeypatch.context() as patched:
        patched.setattr(_config, "load", interrupt)
        # Before the run has a log there is nothing to go on with.
        assert interrupted() == "fgsgd: interrupted\n"
    monkeypatch.setattr(_run, "fit", interrupt)
    said = interrupted("--run-dir", "my run", "--checkpoint-every", "1")
    assert "`fgsgd train --run-dir 'my run' --resume --checkpoint-every 1` goes on from the last checkpoint" in said


def test_nothing_heavy_is_imported_before_it_is_needed():
    """So that `fgsgd` can start, and say what is missing, without the extra."""
    program = "import sys, fgsgd_jax.experiments.__main__; print([n for n in sys.argv[1:] if n in sys.modules])"
    heavy = ["flax", "datasets", "orbax", "matplotlib", "sklearn", "tyro", "rich"]
    found = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_demonstration_prints_a_table_and_draws_a_picture(capsys, tmp_path, refused):
    main(["demo", "--epochs", "3", "--seeds", "2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "picture: runs/demo/picture.png" in out
    for words in ("test error, %", "training, %", "violation", "95 % interval", "of 2 seeds", "Where it does not help"):
        assert words in out
    found = json.loads((tmp_path / "runs/demo/results.json").read_text())
    for (name, config), records in zip(found["setting"].items(), found["trainings"].values(), strict=True):
        assert name in found["trainings"]
        assert [record["seed"] for record in records] == [0, 1]
        assert [record["epochs"] for record in records] == [[1, 2, 3]] * 2
        assert (config["scheme"] == "euc") == (records[0]["violation"] is None)
        assert (records[0]["violation"] or 0) < 1e-6
    assert (tmp_path / "runs/demo/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "already holds something" in refused("demo", "--run-dir", "runs/demo")
    assert "give 2 or more" in refused("demo", "--seeds", "1")


def test_the_demonstration_is_a_setting_of_the_findings():
    """The rates, decays and the difference that it quotes are those of the published comparison."""
    folder = ROOT / "benchmarks" / "results" / "compare_digits_250"
    found = json.loads((folder / "results.json").read_text())
    base = found["comparison"]["base"]
    assert {key: base[key] for key in _demo.SETTING} == _demo.SETTING
    assert base["epochs"] == _demo.Demo().epochs
    tested = {}
    for row, changes in zip(("euc", "pio3~wd=0.005"), _demo.ROWS.values(), strict=True):
        asked = row_config(row, TrainConfig())
        assert TrainConfig(**changes).check() == dataclasses.replace(asked, lr=changes["lr"])
        of_row = [t for t in found["trainings"] if (t["row"], t["stage"]) == (row, "test")]
        assert {t["lr"] for t in of_row} == {changes["lr"]}
        tested[row] = np.array([t["error"] for t in sorted(of_row, key=lambda t: t["seed"])])
    difference = paired_difference(tested["pio3~wd=0.005"], tested["euc"])
    quoted = f"{difference.mean:+.2f}, {difference.lower:+.2f} to {difference.upper:+.2f}"
    assert quoted == _demo.WITH_20_SEEDS
    # Larger than its spread over the seeds.
    assert abs(difference.mean) > np.std(tested["pio3~wd=0.005"] - tested["euc"], ddof=1)


def test_slices_are_drawn_in_their_manifolds_colours():
    kernel = np.array([1.0, -1.0, 0.5, 2.0]).reshape(1, 1, 2, 2).repeat(3, 0).repeat(3, 1)
    picture = tiles(kernel, np.array([[0, 1], [1, 0]]), ["Sphere", "Stiefel"])
    assert picture.shape == (9, 9, 3)
    assert np.all(picture[0] == 1)
    assert np.all(picture[:, 4] == 1)
    sphere, stiefel = (np.array(to_rgb(MANIFOLD_COLOURS[name])) for name in ("Sphere", "Stiefel"))
    np.testing.assert_allclose(picture[1, 1], 1 - 0.25 * (1 - sphere))
    np.testing.assert_allclose(picture[1, 5], 0.35 * stiefel)
    np.testing.assert_allclose(picture[5, 1], 1 - 0.25 * (1 - stiefel))


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    """`kill -9` after a checkpoint, in separate processes: the same final state and log as an undisturbed one."""
    command = [sys.executable, "-m", "fgsgd_jax.experiments", "train", "--limit-train", "128", "--limit-test", "32"]
    command += ["--batch-size", "16", "--epochs", "4", "--checkpoint-every", "5", "--run-dir"]
    subprocess.run([*command, "straight"], check=True, capture_output=True)

    killed = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # The log appears at the end of an epoch and the checkpoints between: wherever this strikes must do.
    while not list(tmp_path.glob("killed/checkpoints/[0-9]*")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    subprocess.run([*command, "killed", "--resume"], check=True, capture_output=True)

    logs, states = [], []
    for name in ("straight", "killed"):
        header, records = MetricsLog(tmp_path / name / "metrics.jsonl").read()
        logs.append([header, *({**record, "seconds": None} for record in records)])
        saved = ocp.StandardCheckpointer().restore(tmp_path / name / "checkpoints" / "32" / "state")
        states.append({path: np.asarray(leaf).tobytes() for path, leaf in saved.items()})
    assert logs[0] == logs[1]
    assert states[0] == states[1]


# The progress bar.


def glance(trainer, step):
    zeta = {path: Zeta(0.5 * step, 0.3, 0.123) for path in trainer.plan_of(0).collections}
    return Glance(step, Totals(32 * step, 16 * step, 12.5 * step, zeta), {"stem/kernel": 2.4e-7})


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_a_terminal_and_lags_by_one_refresh(width, monkeypatch):
    monkeypatch.setattr("fgsgd_jax.experiments._progress.SECONDS_BETWEEN_GLANCES", 0)
    trainer = Trainer(TrainConfig(batch_size=32, epochs=100), load("digits", limit_train=320, limit_test=10))
    terminal, paper = (
        Console(width=width, force_terminal=live, color_system=None, file=io.StringIO()) for live in (True, False)
    )
    with ProgressDisplay(terminal, trainer) as display:
        display.update(lambda: glance(trainer, 5))
        display.update(lambda: glance(trainer, 6))
        paper.print(display._bar.make_tasks_table(display._bar.tasks))
    shown = paper.file.getvalue()
    assert shown.count("\n") == 1
    assert len(shown.rstrip("\n")) <= width
    for part in ("epoch   1/100", "loss 0.391", "acc 50.0%", "viol 2e-07", "ζ>1 50%", "|v|/s 0.12"):
        assert part in shown


def test_an_epochs_line_has_no_constraints_where_there_are_none():
    record = {"epoch": 3, "train": {"loss": 0.5, "error": 1.25}, "test": {"loss": 0.25, "error": 2.0}}
    assert epoch_line(record, 10) == "epoch  3/10  loss 0.500/0.250  error 1.25/2.00%"
    constrained = record | {"violation": 1e-7, "zeta_share": 0.25, "step_ratio": 0.5}
    assert epoch_line(constrained, 10).endswith(" viol 1e-07 ζ>1 25% |v|/s 0.5")
    explained = " ".join(legend(constrained=True))
    assert all(len(line) <= 80 for line in legend(constrained=True))
    assert all(f"{name}: " in explained for name in ("viol", "ζ>1", "|v|/s"))
    assert "viol" not in " ".join(legend(constrained=False))


def test_lines_of_the_log_are_json_even_where_figures_are_not_numbers(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.create({"config": {}})
    log.append({"step": 1, "train": {"loss": float("inf")}, "by": [float("nan")]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["by"] == [None]
