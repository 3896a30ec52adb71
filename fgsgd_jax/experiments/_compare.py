"""The comparison of schemes or optimizers: every row tuned on a grid, trained with the same seeds, tested once."""

import dataclasses
import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fgsgd_jax as fg

from ._augment import resolve
from ._config import Config, TrainConfig
from ._data import data_difference
from ._errors import UsageError
from ._fit import fit
from ._log import Record, finite
from ._rows import row_config, row_rates
from ._state import TrainState
from ._tasks import AnyConfig, config_from_dict, kind_of
from ._trainer import Trainer
from ._versions import versions

RESULTS = "results.json"

# Seeds of the search for the rate are none of those that are reported.
TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a comparison's result depends on."""

    base: AnyConfig
    rows: tuple[str, ...]
    lrs: tuple[float, ...]
    """the grid of rates; on text, multiples of the rate that suits each optimizer"""
    seeds: int
    tuning_seeds: int
    held_out: float
    widen: int = 0
    """how many rates a row may try beyond an end of the grid, one by one, as long as the best lies there"""

    def to_dict(self) -> Record:
        """As JSON reads it. A folder of data goes by its name, for people: its path is of one machine."""
        base = self.base.to_dict() | {"data": self.base.names[0]}
        if isinstance(self.base, TrainConfig):
            base["augment"] = resolve(self.base.augment, self.base.data)
        return dataclasses.asdict(self) | {
            "base": base,
            "rows": list(self.rows),
            "lrs": list(self.lrs),
        }


def compare(comparison: Comparison, folder: Path, say: Callable[[str], None]) -> list[Record]:
    """Train everything that the folder has no result of yet. Rows and seeds may be added to what it has.

    Results go by the content of their data, wherever that lies and whatever its folder is called: the checksums of all
    images and labels, or texts, must be those of the results that are there.

    For each row and rate of the grid the tuning seeds train on the training data but a share, on which they are then
    tested; the rate with the least mean error counts, the lower loss deciding between equal ones, and on text the one
    with the least mean loss. As long as that is at an end of the row's grid, `widen` allows another beyond it. With the
    rate that counts each seed trains on all training data and is tested once, after the last step. The rows' n-th
    trainings have the same seed: the same order of examples and the same augmentation.

    Args:
        comparison: what to compare.
        folder: where the results are kept, each as soon as it is there.
        say: is told of each training.

    Returns:
        The results, one record a training.

    Raises:
        UsageError: the folder holds another comparison, or one of other data.
    """
    path = folder / RESULTS
    found = read_results(path) if path.exists() else None
    data = comparison.base.load()
    header = {"comparison": comparison.to_dict(), "data": data.fingerprint(), "versions": versions()}
    made_now: Record = {}
    if found is not None:
        _refuse_others(found, header, folder)
        if found["versions"] != header["versions"]:
            # The file's versions are those of its first trainings.
            made_now = {"versions": header["versions"]}
            header["versions"] = found["versions"]
    for line in comparison.base.about(data):
        say(line)
    results = [] if found is None else found["trainings"]
    done = {_key(record) for record in results}
    trainers = _Trainers(data)
    criterion = kind_of(comparison.base).criterion

    def add(row: str, stage: str, lr: float, seed: int, config: Config) -> None:
        record: Record = {"row": row, "stage": stage, "lr": lr, "seed": seed}
        if _key(record) in done:
            return
        record |= _train(trainers.of(config), lr, seed) | made_now
        results.append(record)
        done.add(_key(record))
        _write(path, header | {"trainings": results})
        figure = f"loss {record['loss']}" if criterion == "loss" else f"{record['error']:.2f} %"
        say(f"{record['row']}, {record['stage']}, rate {record['lr']:g}, seed {record['seed']}: {figure}")

    for row in comparison.rows:
        config = row_config(row, comparison.base)
        held_out = dataclasses.replace(config, validation=comparison.held_out)
        # A single rate is not tuned.
        tried = comparison.lrs[:1]
        while (grid := row_grid(row, header["comparison"], results)) != tried:
            for lr in row_rates(grid, row, comparison.base):
                for number in range(comparison.tuning_seeds):
                    add(row, "tuning", lr, TUNING_SEED + number, held_out)
            tried = grid
        lr = row_rate(row, header["comparison"], results)
        for seed in range(comparison.seeds):
            add(row, "test", lr, seed, config)
        trainers.forget()
    _write(path, header | {"trainings": results})
    return results


def read_results(path: Path) -> Record:
    """`comparison`, `data` (its checksums), `versions` and `trainings`, as `compare` keeps them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"comparison": dict, "versions": dict, "trainings": list}
        if not all(isinstance(found[name], kind) for name, kind in kinds.items()):
            raise ValueError("it is not what `fgsgd compare` writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return found


def _refuse_others(found: Record, header: Record, folder: Path) -> None:
    """Rows are comparable where data and options were the same: refuse to put others into one table."""
    where = shlex.quote(str(folder))
    if "data" not in found:
        raise UsageError(
            f"the results in {where} have no checksum of their data: nobody can tell what they were trained on; begin "
            "anew with another --run-dir"
        )
    if difference := data_difference(header["data"], found["data"]):
        raise UsageError(
            f"{where} holds a comparison on other data ({difference}): its name may be the same, its content is not; "
            "give that data, or another --run-dir"
        )
    now, then = (_shared(each["comparison"]) for each in (header, found))
    if difference := now["base"].difference(then["base"]):
        raise UsageError(f"{where} holds another comparison ({difference}); give its options, or another --run-dir")
    for name, value in now.items():
        if value != then.get(name):
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{where} holds another comparison ({option} is {value}, was {then.get(name)}); give its options, or "
                "another --run-dir"
            )


def _shared(comparison: Record) -> Record:
    """The options that trainings must have in common to be compared; those that the file does not know yet are at their
    defaults. The data go by their content.
    """
    shared = {name: value for name, value in comparison.items() if name not in ("rows", "seeds", "widen")}
    return shared | {"base": dataclasses.replace(config_from_dict(shared["base"]), data="")}


def _write(path: Path, found: Record) -> None:
    """The file is there whole, as it was or as it is to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(found, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def chosen_rate(lrs: Sequence[float], row: str, results: Sequence[Record], criterion: str = "error") -> float:
    """The rate of the grid with the least mean error on the images held out, then the least loss; or least loss."""
    if len(lrs) == 1:
        return lrs[0]

    def score(lr: float) -> tuple[float, float]:
        tried = [r for r in results if (r["row"], r["stage"], r["lr"]) == (row, "tuning", lr)]
        losses = (math.inf if r["loss"] is None else r["loss"] for r in tried)
        return float(np.mean([r["error"] for r in tried])) if criterion == "error" else 0.0, sum(losses)

    return min(lrs, key=score)


def row_grid(row: str, comparison: Mapping[str, Any], results: Sequence[Record]) -> tuple[float, ...]:
    """The grid of a row as far as it is known: that of all rows, and beyond an end at which the best rate lies another.

    Args:
        row: the row.
        comparison: as `Comparison.to_dict` gives it.
        results: the trainings so far.
    """
    grid, base = sorted(comparison["lrs"]), config_from_dict(comparison["base"])
    tunings = Counter(r["lr"] for r in results if (r["row"], r["stage"]) == (row, "tuning"))
    for _ in range(comparison.get("widen", 0)):
        rates = row_rates(grid, row, base)
        if len(rates) == 1 or any(tunings[rate] < comparison["tuning_seeds"] for rate in rates):
            break
        best = chosen_rate(rates, row, results, kind_of(base).criterion)
        if best == rates[0]:
            grid.insert(0, _rounded(grid[0] ** 2 / grid[1]))
        elif best == rates[-1]:
            grid.append(_rounded(grid[-1] ** 2 / grid[-2]))
        else:
            break
    return tuple(grid)


def row_rate(row: str, comparison: Mapping[str, Any], results: Sequence[Record]) -> float:
    """The rate that the search found for a row."""
    base = config_from_dict(comparison["base"])
    return chosen_rate(row_rates(row_grid(row, comparison, results), row, base), row, results, kind_of(base).criterion)


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")


class _Trainers:
    """The compiled trainers of one row at a time: they hold the data on the device."""

    def __init__(self, data: Any):
        self._data = data
        self._trainers: dict[Config, Trainer] = {}

    def of(self, config: Any) -> Trainer:
        if config not in self._trainers:
            share = config.validation
            data = kind_of(config).hold_out(self._data, share) if share else self._data
            self._trainers[config] = Trainer(config, data)
        return self._trainers[config]

    def forget(self) -> None:
        self._trainers.clear()


class _Epochs:
    """The observer that keeps the epochs' figures."""

    def __init__(self):
        self.records: list[Record] = []

    def progress(self, glance: Any) -> None:
        del glance

    def epoch(self, record: Record) -> None:
        self.records.append(record)

    def checkpoint(self, step: int, state: TrainState) -> None:
        del step, state


def _train(trainer: Trainer, lr: float, seed: int) -> Record:
    plan: fg.Plan | None = trainer.plan_of(seed)
    epochs = _Epochs()
    state = fit(trainer, trainer.start(seed, lr), epochs, checkpoint_every=10**9, report=trainer.report_training)
    loss, error = trainer.evaluate(state)
    records = epochs.records
    found = {
        "loss": loss,
        "error": error,
        "train_loss": [record["train"]["loss"] for record in records],
        "train_error": [record["train"]["error"] for record in records],
        "seconds": sum(record["seconds"]["train"] for record in records),
        # The first epoch has the compilation in it.
        "step_seconds": float(np.median([record["seconds"]["step"] for record in records])),
    }
    if plan is not None:
        found |= {
            "violation": max(record["violation"] for record in records),
            "zeta_share": float(np.mean([record["zeta_share"] for record in records])),
            "step_ratio": max(record["step_ratio"] for record in records),
        }
    return finite(found)


def _key(record: Record) -> tuple:
    return record["row"], record["stage"], record["lr"], record["seed"]
