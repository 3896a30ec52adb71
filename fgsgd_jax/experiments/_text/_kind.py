from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from .._errors import unknown
from .._kind import Kind, listed, widened
from ._config import RATE_OF, SCHEME_OF
from ._corpus import TextSet, hold_out_text
from ._rules import SCHEMES


class TextKind(Kind):
    """Comparisons on text: optimizers, after `:` with a scheme if it is not their own, by test loss."""

    rows = (
        "adamw",
        "muon",
        "hyperball",
        "muon-hyperball",
        "spel",
        "spel:heads",
        "manifold-muon",
        "on-manifolds",
        "on-manifolds:oblique",
        "on-manifolds:po-heads",
        "on-manifolds:pio-tiles",
        "fgsgd",
    )
    options: ClassVar = {
        "wd": "weight_decay",
        "momentum": "momentum",
        "free-lr": "free_lr",
        "warmup": "warmup",
        "schedule": "schedule",
        "retraction": "retraction",
        "tangent": "tangent",
        "start": "start",
    }
    references = ("adamw", "muon", "spel")
    criterion, unit, differences = "loss", "nats a byte", "nats"
    figures = "Losses in nats a byte, errors in percent of the likeliest next byte"
    examples, stretch, times = "text", "step", "× "

    def name(self, row: str, name: str) -> str:
        found = self.fields(row, name)
        optimizer, scheme = found["optimizer"], found["scheme"]
        return optimizer if scheme == SCHEME_OF[optimizer] else f"{optimizer}:{scheme}"

    def fields(self, row: str, name: str) -> dict[str, Any]:
        optimizer, colon, scheme = name.partition(":")
        if optimizer not in SCHEME_OF:
            raise unknown(f"optimizer in the row {row!r}:", optimizer, SCHEME_OF)
        if colon and scheme not in SCHEMES:
            raise unknown(f"scheme in the row {row!r}:", scheme, SCHEMES)
        return {"optimizer": optimizer, "scheme": scheme if colon else SCHEME_OF[optimizer], "lr": None}

    def rates(self, lrs: Sequence[float], name: str) -> tuple[float, ...]:
        own = RATE_OF[self.fields(name, name)["optimizer"]]
        return tuple(float(f"{lr * own:.6g}") for lr in lrs)

    def hold_out(self, data: TextSet, share: float) -> TextSet:
        return hold_out_text(data, share)

    def setting(self, base: Any, comparison: Mapping[str, Any]) -> str:
        trainings = comparison["tuning_seeds"]
        tuned = (
            f"Rates: {listed(comparison['lrs'])} times each optimizer's own{widened(comparison)}, chosen for every row "
            f"by the mean loss of {trainings} training{'s' * (trainings > 1)} on the last "
            f"{comparison['held_out']:.0%} of every training file, held out. The test text was read once by every "
            "training, after its last step."
            if len(comparison["lrs"]) > 1
            else f"Rate: {comparison['lrs'][0]:g} times each optimizer's own, not tuned."
        )
        return (
            f"A GPT of {base.layers} blocks, {base.width} channels and {base.heads} heads; {base.steps} steps of "
            f"{base.batch_size} passages of {base.context} bytes; {base.warmup} steps of warm-up, schedule "
            f"{base.schedule}; momentum {base.momentum:g}; weight decay of free matrices {base.weight_decay:g}; AdamW "
            f"at {base.free_lr:g} for what optimizers of matrices leave out. {tuned}"
        )

    def places(self, base: Any, count: int) -> np.ndarray:
        # A stretch's loss is that of its middle.
        ends = np.minimum(np.arange(1, count + 1) * base.report_every, base.steps)
        return (ends + np.arange(count) * base.report_every) / 2
