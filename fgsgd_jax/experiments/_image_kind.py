from collections.abc import Mapping
from typing import Any, ClassVar

from ._data import ImageSet, check, hold_out
from ._kind import Kind, listed, widened
from ._schemes import short_name


class ImageKind(Kind):
    """Comparisons on images: schemes, by test error."""

    # The rows of the paper's tables: schemes by their shortest names.
    rows = (
        "euc",
        "wn",
        "each-sp",
        "each-ob",
        "each-st",
        "sp",
        "ob",
        "st",
        "poms-st",
        "pi3",
        "po3",
        "pio-sp-ob",
        "pio-sp-st",
        "pio-ob-st",
        "pio3",
        "pio4",
    )
    options: ClassVar = {
        "wd": "weight_decay",
        "momentum": "momentum",
        "gamma": "gamma",
        "lambda": "lambda_",
        "floor": "lambda_floor",
        "retraction": "retraction",
        "schedule": "schedule",
        "rho": "rho",
        "curvature": "curvature",
        "zeta": "zeta",
        "pooling": "pooling",
        "clip": "clip",
    }
    references = ("euc", "st", "pio3")
    criterion, unit, differences = "error", "%", "points"
    figures = "Errors in percent"
    examples, stretch = "images", "epoch"

    def name(self, row: str, name: str) -> str:
        del row
        return short_name(name)

    def fields(self, row: str, name: str) -> dict[str, Any]:
        del row
        return {"scheme": name}

    def hold_out(self, data: ImageSet, share: float) -> ImageSet:
        return check(hold_out(data, share))

    def setting(self, base: Any, comparison: Mapping[str, Any]) -> str:
        options = comparison["base"]
        limit = "all" if base.limit_train is None else base.limit_train
        tuned = (
            f"Rates: {listed(comparison['lrs'])}{widened(comparison)}, chosen for every row by the mean error of "
            f"{comparison['tuning_seeds']} trainings on {comparison['held_out']:.0%} of the training images, held out. "
            "The test images were read once by every training, after its last step."
            if len(comparison["lrs"]) > 1
            else f"Rate: {comparison['lrs'][0]:g} for every row, not tuned."
        )
        return (
            f"Training images: {limit}; {base.epochs} epochs in batches of {base.batch_size}; schedule "
            f"{base.schedule}; momentum {base.momentum:g}; weight decay of Euclidean weights {base.weight_decay:g}; "
            f"augmentation {options['augment']}; γ {base.gamma}; λ {base.lambda_}. {tuned}"
        )
