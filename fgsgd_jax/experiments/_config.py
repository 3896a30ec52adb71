import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Self,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import tyro

from ._augment import Augmentation, resolve
from ._data import ImageSet, load
from ._errors import UsageError
from ._options import options
from ._schedules import ScheduleName
from ._schemes import Pooling, Retraction, full_name

Gamma = Literal["glorot", "literal"] | float
Task = Literal["images", "text"]


@runtime_checkable
class Data(Protocol):
    """Images or texts in memory."""

    @property
    def name(self) -> str: ...

    def summary(self) -> list[str]:
        """What there is, and what was done to it: a line each."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """What a run writes down about its data, so that it is never resumed on other data unnoticed."""
        ...


@dataclasses.dataclass(frozen=True)
class Config(ABC):
    """Options of a training, of whatever task: what goes to JSON and back, and what two of them differ in."""

    LENGTH: ClassVar[str]
    """The field that says how long the training is."""

    task: Task

    @abstractmethod
    def check(self) -> Self:
        """The same with every default and short name spelled out. Refuses values outside their range."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """The learning rate."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What tells this training from others: data, model, scheme."""

    @abstractmethod
    def load(self) -> Data:
        """The data that these options ask for."""

    def about(self, data: Data) -> list[str]:
        """What is trained and tested on, and how it is changed: what a user would want to know beforehand."""
        return data.summary()

    @property
    def length(self) -> int:
        return getattr(self, self.LENGTH)

    def of_length(self, length: int) -> Self:
        return dataclasses.replace(self, **{self.LENGTH: length})

    def named(self, field: str) -> Any:
        """An option by the one name of its value, where that has several."""
        return getattr(self, field)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; options that the file does not know yet take their defaults."""
        known = {field.name for field in dataclasses.fields(cls)}
        if strange := sorted(set(values) - known):
            raise UsageError(f"this run was made by another version of fgsgd: it has the option {option(strange[0])}")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not fits(value, hints[name]):
                raise UsageError(f"the options of this run are damaged: {option(name)} is {value!r}")
        return cls(**{name: _floating(value, hints[name]) for name, value in values.items()})

    def difference(self, other: "Config") -> str | None:
        """The first option in which two configs differ, in words."""
        if type(self) is not type(other):
            return f"--task is {self.task}, was {other.task}"
        for field in dataclasses.fields(self):
            mine, others = self.named(field.name), other.named(field.name)
            if mine != others:
                return f"{option(field.name)} is {mine}, was {others}"
        return None

    def _whole(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{option(name)} {value}: give a whole number of 1 or more")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option(name)} {value}: give a number above 0")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{option(name)} {getattr(self, name)}: give a number of 0 or more")

    def _below_one(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{option(name)} {getattr(self, name)}: give a number from 0 up to, but not, 1")

    def _seed(self, name: str = "seed") -> None:
        if not 0 <= getattr(self, name) < 2**32:
            raise UsageError(f"{option(name)} {getattr(self, name)}: give a whole number from 0 to 2³²−1")


@options
class TrainConfig(Config):
    """Everything that a training's result depends on. Two runs of one config give the same weights."""

    LENGTH: ClassVar[str] = "epochs"

    task: Task = "images"
    """`images`, with the options below; or `text`, which has others: `--task text --help`."""
    data: str = "digits"
    """`digits` (built in); a folder of Parquet files with an image and a label column; a folder with one folder of
    images per class, in train/ and test/ or not; a .npz file of arrays x_train, y_train (, x_test, y_test); or a name
    on the Hugging Face hub (owner/set or owner/set:config). Without a split to test on, a fifth is held out."""
    model: str = "resnet8"
    """resnet8|14|20|32|44|56|110, resnet50|101, each with `se` before it; linen-resnet8|…|110; plain8|…|110, which
    have no normalization."""
    scheme: str = "pio:sp+ob+st"
    """euc (the baseline), wn (the same with weight normalization), st, sp, ob, each-st, each-sp, each-ob, poms-st, or
    pi:, po:, pio: with any of sp, ob, st, euc joined by +. Shorter: pio3 is pio:sp+ob+st, pio4 is pio:sp+ob+st+euc, and
    so pi3, pi4, po3, po4; pio-sp-st is pio:sp+st."""
    epochs: int = 30
    """How often every training image is seen."""
    batch_size: int = 128
    """Images to a step; the last, smaller batch of an epoch is left out."""
    lr: float = 0.1
    """The learning rate at the first step."""
    momentum: float = 0.9
    """Of the gradients; 0 for none."""
    weight_decay: float = 5e-4
    """L2, on Euclidean weights only: it has no effect on the manifolds."""
    schedule: ScheduleName = "cosine"
    """The learning rate over the steps: to zero by a cosine; to a tenth at half of them and again at three quarters; to
    a tenth as eq. 4 wants it; or the same throughout, and only then a run can be made longer afterwards."""
    seed: int = 0
    """Of the weights, the plan, the images' order and the augmentation."""
    gamma: Gamma = "glorot"
    """The weights' scale: `glorot` (eq. 2 with Glorot's fan-out), `literal` (with the output's size) or a number."""
    lambda_: Annotated[Literal["off", "first", "epoch"], tyro.conf.arg(name="lambda")] = "off"
    """Rescale the weights by the standard deviation of their features: never, four times during the first epoch,
    or after every epoch."""
    lambda_floor: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """The smallest standard deviation used: 1 keeps the norms' bounds, and where left out there is no smallest."""
    retraction: Retraction = "polar"
    """How Stiefel weights return to their manifold."""
    rho: float = 1.0
    """ρ of eq. 5."""
    curvature: float = 0.0
    """c of eq. 5, a bound on the curvature."""
    zeta: Literal["on", "late", "off", "clip"] = "on"
    """Line 6 of Algorithm 1: divide each group's gradient by ζ; its momentum instead; neither; or clip the gradient at
    the norm where ζ begins to act (at c = 0)."""
    pooling: Pooling = "scheme"
    """The groups of ζ: the scheme's, layer, slice, or pi, po, pio in three, whatever their manifolds."""
    clip: Annotated[float | None, tyro.conf.arg(metavar="NORM")] = None
    """Shorten the gradient of all weights together to this norm, before anything else."""
    augment: Augmentation = "auto"
    """auto: random crops, and flips too unless the images are the built-in digits."""
    limit_train: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Train on N images, class-balanced, the same ones whatever the seed."""
    limit_test: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Test on N images, chosen likewise."""
    validation: float = 0.0
    """Test on this share of the training images, held out, instead of on the test images."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Cut and scale every image to N×N."""
    image_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The column of images; found by its type where left out."""
    label_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The column of labels; found by its type where left out."""

    def check(self) -> "TrainConfig":
        """The same with the scheme by its full name. Refuses values outside their range, naming the option."""
        self._whole("epochs", "batch_size", "limit_train", "limit_test", "image_size")
        self._above_zero("lr", "rho", "lambda_floor", "clip")
        self._not_negative("weight_decay", "curvature")
        self._below_one("momentum", "validation")
        if not isinstance(self.gamma, str) and not 0 < self.gamma < float("inf"):
            raise UsageError(f"--gamma {self.gamma}: give `glorot`, `literal` or a number above 0")
        self._seed()
        return dataclasses.replace(self, scheme=full_name(self.scheme))

    @property
    def rate(self) -> float:
        return self.lr

    @property
    def names(self) -> tuple[str, ...]:
        return Path(self.data).expanduser().name, self.model, full_name(self.scheme)

    def load(self) -> ImageSet:
        return load(
            self.data,
            image_column=self.image_column,
            label_column=self.label_column,
            image_size=self.image_size,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
            validation=self.validation,
        )

    def about(self, data: Data) -> list[str]:
        augmentation = resolve(self.augment, self.data)
        words = {"none": "none", "crop": "random crops", "crop-flip": "random crops, mirrored half of the time"}[
            augmentation
        ]
        if self.augment == "auto" and augmentation == "crop-flip":
            words += " (--augment crop where a mirrored image is another thing, as of digits)"
        return [*data.summary(), f"augmentation: {words}"]

    def named(self, field: str) -> Any:
        value = getattr(self, field)
        return full_name(value) if field == "scheme" else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from text is one that an option can have."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return value in choices
    if choices:
        return any(fits(value, choice) for choice in choices)
    if hint is float and isinstance(value, int):
        # As many whole numbers as a float tells apart.
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, hint) and not isinstance(value, bool)


def _floating(value: Any, hint: Any) -> Any:
    """A whole number as the float that an option is, which other programs write without its point."""
    takes = (hint, *get_args(hint))
    return float(value) if isinstance(value, int) and float in takes and int not in takes else value


def option(name: str) -> str:
    """A field's name as the command line spells it."""
    return "--" + name.strip("_").replace("_", "-")
