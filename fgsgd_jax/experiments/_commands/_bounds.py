import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fgsgd_jax as fg
from fgsgd_jax.bounds import Norms

from .._bounds_picture import draw_bounds, largest_of, no_bound
from .._checkpoints import Checkpoints
from .._config import TrainConfig
from .._correlation import RESAMPLES, spearman
from .._data import data_difference
from .._errors import UsageError, resume_command
from .._log import MetricsLog
from .._measures import FORMS, PAPERS, Measurer, Measures, log10
from .._options import options
from .._run import CHECKPOINTS, LOG
from .._tasks import config_from_dict
from .._trainer import Trainer
from ._command import Command

PICTURE = "bounds.png"
FEWEST_RUNS = 3
CAUTION = """\
As in their own papers the bounds are theorems for chains of layers and ReLUs, up to constants. Table 1 takes kernels
for operators and no margins; its products over groups shrink with every group of a norm below 1: no theorem stands
behind them. Such measures often fail to predict generalization: `fgsgd bounds --correlate` compares them over runs."""


@options
class Bounds(Command):
    """Report norms, certificates and bounds of a network, or compare bounds of runs."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """A run directory, of which the newest checkpoint is measured, or one of its checkpoints (RUN/checkpoints/STEP)."""
    correlate: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Instead, compare the bounds with the measured gaps over these runs, three or more."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """Where the picture goes; bounds.png in the run directory where left out."""

    def run(self, console: Console) -> None:
        if (self.checkpoint is None) == (not self.correlate):
            raise UsageError("give either a run directory or checkpoint, or --correlate with three or more runs")
        if self.checkpoint is None:
            _correlate(self.correlate, console)
            return
        folder, step = find(self.checkpoint)
        picture = self.picture or folder / PICTURE
        if not picture.parent.is_dir():
            raise UsageError(f"--picture {picture}: there is no folder {picture.parent}")
        step, config, measures = measured(folder, step)
        title = f"{config.model}, {config.scheme}, {Path(config.data).name}, step {step}"
        report(measures, title, console)
        try:
            draw_bounds(measures, title, picture)
        except OSError as error:
            raise UsageError(f"the picture {picture} cannot be written: {error.strerror or error}") from error
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def find(path: Path) -> tuple[Path, int | None]:
    """The run directory that a user means, and the step, if one."""
    if (path / LOG).is_file():
        return path, None
    folder = path.parent.parent
    if path.parent.name == CHECKPOINTS and path.name.isdigit() and path.is_dir() and (folder / LOG).is_file():
        return folder, int(path.name)
    raise UsageError(
        f"{path} is neither the directory of a run (with {LOG}) nor one of its checkpoints ({CHECKPOINTS}/STEP)"
    )


def measured(folder: Path, step: int | None) -> tuple[int, TrainConfig, Measures]:
    """Measure a run's checkpoint: the newest where no step is given. Also the step and the run's options."""
    if not (folder / CHECKPOINTS).is_dir():
        raise UsageError(f"the run in {folder} has no checkpoint yet; go on with it by `{resume_command(folder)}`")
    header, _ = MetricsLog(folder / LOG).read()
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    try:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise UsageError(f"the run in {folder} has no checkpoint yet; go on with it by `{resume_command(folder)}`")
        about = checkpoints.about(step)
        config = config_from_dict(about["config"])
        if not isinstance(config, TrainConfig):
            raise UsageError(f"the run in {folder} is of text; the bounds are those of networks for images")
        data = config.load()
        if difference := data_difference(data.fingerprint(), header.get("data") or {}):
            raise UsageError(
                f"data {data.name!r} is not what the run in {folder} was trained on ({difference}); bring that back"
            )
        trainer = Trainer(config, data)
        start = trainer.start(config.seed)
        state = checkpoints.restore(step, start)
    finally:
        checkpoints.close()
    # The plan that the weights were trained under, whatever this version would deal.
    plan = None if about["plan"] is None else fg.Plan.from_json(about["plan"])
    return step, config, Measurer(trainer, start.params)(state, plan)


def report(measures: Measures, title: str, console: Console) -> None:
    """Print everything about one network."""
    console.print(f"[bold]{title}[/bold]", highlight=False)
    heads = ("layer", "groups", "Frobenius", "spectral", "2→1")
    groups = _table("Groups: the largest measured norm ≤ the largest bound on the manifolds", *heads)
    operators = _table("Layers as operators, with batch normalization", "layer", "reshaped", "circular", "certified ≤")
    for path, layer in measures.norms.items():
        pairs = [
            [largest_of(kind, name) for kind in (layer.groups.measured, layer.groups.bound)] for name in Norms._fields
        ]
        count = np.size(layer.groups.measured.frobenius)
        groups.add_row(_short(path), str(count), *(f"{value:.2g} ≤ {_number(bound, '.2g')}" for value, bound in pairs))
    for path, norms in measures.operators.items():
        operators.add_row(_short(path), *(f"{float(value):.3f}" for value in norms))
    console.print(groups)
    if measures.certificate.groups:
        console.print("Proposition 1, every norm of a group ≤ 1:", highlight=False)
        console.print(str(measures.certificate), highlight=False, markup=False)
    else:
        console.print("Proposition 1: no weight is constrained, there are no groups to certify", highlight=False)
    console.print(operators)
    bounds = _table("Generalization bounds, log10: above 0 they say nothing", "", *FORMS.values())
    for paper, name in PAPERS.items():
        values = [log10(getattr(getattr(measures.bounds, form), paper)) for form in FORMS]
        bounds.add_row(name, *(_number(value, ".2f") for value in values))
    console.print(bounds)
    if reason := no_bound(measures):
        console.print(reason, highlight=False)
    lipschitz = "none, for its gates" if measures.log_lipschitz is None else f"10^{log10(measures.log_lipschitz):.2f}"
    console.print(
        f"Lipschitz bound: {lipschitz}\n"
        f"margin γ: {measures.bounds.margin:.3g}; {100 * measures.bounds.margin_loss:.1f} % of the training images "
        "have no more\n"
        f"error: {measures.train_error:.2f} % in training, {measures.test_error:.2f} % in the test, gap "
        f"{measures.gap:.2f} %",
        highlight=False,
        soft_wrap=True,
    )
    console.print(CAUTION.replace("\n", " "), highlight=False)


def _correlate(folders: tuple[Path, ...], console: Console) -> None:
    if len(folders) < FEWEST_RUNS:
        raise UsageError(f"--correlate needs {FEWEST_RUNS} or more runs, here are {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--correlate names a run twice")
    found = [find(folder) for folder in folders]
    _refuse_mixed(folders, found)
    records = [_record(*each) for each in found]
    measures = {
        f"{name}, {title}": [record["log"][form][paper] for record in records]
        for form, title in FORMS.items()
        for paper, name in PAPERS.items()
    } | {"Lipschitz bound": [record["log_lipschitz"] for record in records]}
    heads = ("run", *PAPERS.values(), "gap, %")
    runs = _table("Runs: log10 of the bounds as in their own papers, and the measured gap", *heads)
    gaps = np.array([record["gap"] for record in records], float)
    for folder, record in zip(folders, records, strict=True):
        values = [_number(log10(record["log"]["papers"][paper]), ".2f") for paper in PAPERS]
        runs.add_row(folder.name, *values, f"{record['gap']:.2f}")
    console.print(runs)
    table = _table("Rank correlation (Spearman) of bound and gap", "bound", "ρ", "95 % interval", "runs")
    for name, values in measures.items():
        values = np.array([math.nan if value is None else value for value in values], float)
        # A bound that is infinite has a rank; one that a network does not have has none.
        known = ~np.isnan(values)
        if known.sum() < FEWEST_RUNS:
            table.add_row(name, "—", "—", str(known.sum()))
            continue
        rho, lower, upper = spearman(values[known], gaps[known])
        interval = "—" if math.isnan(lower) else f"{lower:+.2f} to {upper:+.2f}"
        table.add_row(name, "—" if math.isnan(rho) else f"{rho:+.2f}", interval, str(known.sum()))
    console.print(table)
    console.print(
        f"Intervals by bootstrap over runs ({RESAMPLES} resamples); of few runs they are rough. Where all ranks agree "
        "the interval is a point, and that is no certainty: ranks of "
        f"{len(folders)} runs agree by chance once in {math.factorial(len(folders))}.",
        highlight=False,
    )


def _refuse_mixed(folders: tuple[Path, ...], found: list[tuple[Path, int | None]]) -> None:
    """Gaps are comparable where the test was the same; a run copied or made again under other names is no other run."""
    seen: dict[str, Path] = {}
    data: list[dict[str, Any]] = []
    for given, (folder, step) in zip(folders, found, strict=True):
        header, records = MetricsLog(folder / LOG).read()
        if not isinstance(header.get("data"), dict):
            raise UsageError(f"the log of {given} has no checksum of its data: nobody can tell what it was tested on")
        data.append(header["data"])
        # One config gives the same weights on the same data, whatever these are called and how long it took.
        if step is None and records:
            step = records[-1]["step"]
        content = json.dumps([header | {"config": header.get("config", {}) | {"data": ""}}, step], sort_keys=True)
        if content in seen:
            raise UsageError(
                f"--correlate names a run twice: {seen[content]} and {given} are one training, of the same options, "
                "data and steps"
            )
        seen[content] = given
        # What was trained on may differ in number: that is one of the things that a bound should know of.
        if difference := data_difference(data[-1] | {"train": None}, data[0] | {"train": None}):
            raise UsageError(
                f"--correlate: {given} was not tested on the images that {folders[0]} was ({difference}); gaps of "
                "different tests cannot be compared"
            )


def _record(folder: Path, step: int | None) -> dict[str, Any]:
    """The figures of a run: those in the last line of its log, or measured now."""
    if step is None:
        _, records = MetricsLog(folder / LOG).read()
        if records and "bounds" in records[-1]:
            # The log has null for what is not finite: a bound that is none.
            return _infinite(records[-1]["bounds"])
    return measured(folder, step)[2].record()


def _infinite(record: dict[str, Any]) -> dict[str, Any]:
    log = {
        form: {paper: math.inf if value is None else value for paper, value in papers.items()}
        for form, papers in record["log"].items()
    }
    return record | {"log": log}


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _short(path: str) -> str:
    return path.removesuffix("/kernel")


def _number(value: float, form: str) -> str:
    return "∞" if math.isinf(value) else "—" if math.isnan(value) else format(value, form)
