import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from .._config import Config, Task
from .._errors import UsageError
from .._options import options
from .._schedules import ScheduleName
from .._schemes import Retraction
from ._corpus import TextSet, load_text

Optimizer = Literal["adamw", "muon", "hyperball", "muon-hyperball", "spel", "manifold-muon", "on-manifolds", "fgsgd"]
Start = Literal["uniform", "nearest", "free"]
Scheme = Literal["auto", "euc", "euc-heads", "spheres", "stiefel", "heads", "oblique", "po-heads", "pio-tiles"]

# What the weights of each optimizer live on, where nothing else is asked for.
SCHEME_OF: dict[Optimizer, Scheme] = {
    "adamw": "euc",
    "muon": "euc",
    "hyperball": "spheres",
    "muon-hyperball": "spheres",
    "spel": "stiefel",
    "manifold-muon": "stiefel",
    "on-manifolds": "heads",
    "fgsgd": "heads",
}
UNCONSTRAINED = ("adamw", "muon")
FREE = ("euc", "euc-heads")

# Where the search for each optimizer's rate begins.
RATE_OF: dict[Optimizer, float] = {
    "adamw": 0.01,
    "muon": 0.05,
    "hyperball": 0.05,
    "muon-hyperball": 0.05,
    "spel": 0.05,
    "manifold-muon": 0.05,
    "on-manifolds": 0.01,
    "fgsgd": 3.0,
}


@options
class TextConfig(Config):
    """Everything that a training on text depends on. Two runs of one config give the same weights."""

    LENGTH: ClassVar[str] = "steps"

    task: Task = "text"
    """`text`, with the options below; or `images`, which has others: `--task images --help`."""
    data: str = "stdlib"
    """`stdlib`, the source of Python's own standard library; a text file; a folder of text files (.txt, .md, .py, .rst,
    .tex, .csv, .json, .html or without a suffix, at any depth); or a set of texts on the Hugging Face hub (owner/set or
    owner/set:config)."""
    held_out: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """Files to test on, whole: shell patterns separated by commas, as persuasion.txt. Left out: a tenth of the files,
    chosen by a hash of their names; of a single file its last tenth; of a set its own split."""
    text_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The column of texts in a set; `text`, or the only one of words, where left out."""
    optimizer: Optimizer = "spel"
    """adamw; muon; hyperball (Adam inside) and muon-hyperball; spel; manifold-muon; on-manifolds (AdamW with projected
    gradients); fgsgd."""
    scheme: Scheme = "auto"
    """What the weights live on: euc (free), euc-heads (the same, with Muon by heads), spheres (one a matrix), stiefel
    (one a matrix), heads (a Stiefel manifold a head and a matrix of the MLPs, unit embeddings), oblique (the same with
    unit columns in the MLPs), po-heads and pio-tiles (the same with sphere, oblique and Stiefel mixed over the heads,
    or over tiles of the MLPs). Left out: what suits the optimizer."""
    steps: int = 300
    """Steps of the training."""
    report_every: int = 50
    """Steps from one line of the log to the next: each tests on held-out text."""
    batch_size: int = 16
    """Passages to a step, drawn at random."""
    context: int = 128
    """Bytes to a passage: so many are seen at once."""
    layers: int = 4
    """Blocks of the GPT."""
    width: int = 128
    """Its channels."""
    heads: int = 4
    """Its heads; the width is a multiple of twice their number."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """The learning rate after the warm-up: in radii for spel, manifold-muon and hyperball. Left out: 0.05 for these and
    muon, 0.01 for adamw and on-manifolds, 3 for fgsgd."""
    free_lr: float = 0.01
    """AdamW's rate for what an optimizer of matrices leaves out: embedding, head, scales."""
    warmup: int = 20
    """Steps over which the rates rise from zero."""
    schedule: ScheduleName = "cosine"
    """The learning rate over the steps: to zero by a cosine; in steps; by eq. 4; or the same throughout, and only then
    a run can be made longer afterwards."""
    momentum: float = 0.95
    """Of the gradients: for muon, spel, manifold-muon and fgsgd."""
    weight_decay: float = 0.1
    """AdamW's and Muon's, on free matrices."""
    tangent: Literal["on", "off"] = "on"
    """Project onto the tangent space before spel's direction, or not."""
    start: Start = "uniform"
    """Constrained weights begin uniform on their manifolds, at the nearest point to where free ones begin, or where
    free ones begin: the first gradient is taken there, and the first step leads to the manifolds."""
    retraction: Retraction = "polar"
    """How Stiefel weights return to their manifold."""
    seed: int = 0
    """Of the weights, the plan and the passages."""
    test_bytes: int = 65536
    """Test on so many bytes of the held-out text, spread over it."""
    limit_train: Annotated[int | None, tyro.conf.arg(metavar="BYTES")] = None
    """Train on the first so many bytes only."""
    validation: float = 0.0
    """Test on this share of the training text, the last part of every file, instead of on the held-out text."""

    def check(self) -> "TextConfig":
        """The same with the optimizer's own scheme and rate where they were left out. Refuses values out of range."""
        self._whole("steps", "report_every", "batch_size", "context", "layers", "width", "heads", "test_bytes")
        self._whole("limit_train")
        self._above_zero("lr", "free_lr")
        self._not_negative("weight_decay", "warmup")
        self._below_one("momentum", "validation")
        self._seed()
        if self.width % (2 * self.heads):
            raise UsageError(
                f"--width {self.width} cannot be shared out over {self.heads} heads in pairs; give a multiple of "
                f"{2 * self.heads}, or other --heads"
            )
        scheme = SCHEME_OF[self.optimizer] if self.scheme == "auto" else self.scheme
        if (self.optimizer in UNCONSTRAINED) != (scheme in FREE):
            free = [name for name in get_args(Optimizer) if name in UNCONSTRAINED]
            raise UsageError(
                f"--optimizer {self.optimizer} --scheme {scheme}: {' and '.join(free)} have free weights (euc), all "
                "others weights on manifolds; leave --scheme out, or give on-manifolds for AdamW on manifolds"
            )
        if scheme == "euc-heads" and self.optimizer != "muon":
            raise UsageError(f"--optimizer {self.optimizer} --scheme {scheme}: only muon takes heads by themselves")
        if self.tangent == "off" and self.optimizer != "spel":
            raise UsageError(f"--tangent off --optimizer {self.optimizer}: only spel goes without the projection")
        if self.start != "uniform" and scheme in FREE:
            raise UsageError(f"--start {self.start} --optimizer {self.optimizer}: no weight is constrained")
        return dataclasses.replace(self, scheme=scheme, lr=RATE_OF[self.optimizer] if self.lr is None else self.lr)

    @property
    def rate(self) -> float:
        return RATE_OF[self.optimizer] if self.lr is None else self.lr

    @property
    def names(self) -> tuple[str, ...]:
        scheme = SCHEME_OF[self.optimizer] if self.scheme == "auto" else self.scheme
        return Path(self.data).expanduser().name, f"gpt{self.layers}x{self.width}", self.optimizer, scheme

    def load(self) -> TextSet:
        return load_text(
            self.data,
            held_out=self.held_out,
            text_column=self.text_column,
            limit_train=self.limit_train,
            validation=self.validation,
        )

    def named(self, field: str) -> Any:
        return getattr(self.check(), field) if field in ("scheme", "lr") else getattr(self, field)
