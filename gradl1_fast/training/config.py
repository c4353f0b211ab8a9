"""What a training run is made of: everything that, with the data, decides its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gradl1_fast import _checks as check
from gradl1_fast.training import toml

__all__ = ["Config", "Data", "Model", "Optimizer", "Penalty", "Training", "recipe", "recipes"]

OPTIMIZERS = ("sgd", "adam", "adamw")
PRECISIONS = ("float32", "bfloat16", "float16")
SCALES = ("none", "step")


@dataclass(frozen=True)
class Data:
    """The data set and how its images are varied.

    Attributes:
        name: as for :func:`gradl1_fast.training.data.load`.
        folder: where its files are; None for where they are usually found.
        size: of the sides of the images, where the data set leaves the choice; None for its own.
        flip: flip training images horizontally at random.
        crop: maximum random shift of a training image in pixels, zero-padded; 0 disables it.
    """

    name: str = "digits"
    folder: str | None = None
    size: int | None = None
    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.size is not None:
            check.count("size", self.size)
        _number("crop", self.crop)


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        name: as for :func:`gradl1_fast.training.models.build`.
        width: channels of its first layer; None for its own.
        stem: ``"cifar"`` or ``"imagenet"``, where it has both; None for its own.
        per_channel: one range for each output channel of a weight.
        initialiser: distribution of the initial weights, a key of
            :data:`gradl1_fast.training.models.INITIALISERS`; None for the network's own.
    """

    name: str = "digits_net"
    width: int | None = None
    stem: str | None = None
    per_channel: bool = False
    initialiser: str | None = None

    def __post_init__(self) -> None:
        if self.width is not None:
            check.count("width", self.width)


@dataclass(frozen=True)
class Optimizer:
    """How weights are changed; the learning rate falls along a cosine to 0 at the end.

    Attributes:
        name: ``"sgd"`` (with Nesterov's momentum), ``"adam"`` or ``"adamw"``.
        learning_rate: at its highest.
        momentum: of ``"sgd"`` alone.
        weight_decay: of all parameters, biases and those of batch norms among them, as torch.optim does it
            and as the recipes were measured; decoupled with ``"adamw"``.
        warmup_epochs: number of epochs of linear warm-up.
    """

    name: str = "adam"
    learning_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        check.one_of("name", self.name, OPTIMIZERS)
        if not check.coefficient("learning_rate", self.learning_rate):
            raise ValueError("learning_rate must be more than 0")
        _fraction("momentum", self.momentum)
        check.coefficient("weight_decay", self.weight_decay)
        _number("warmup_epochs", self.warmup_epochs)


@dataclass(frozen=True)
class Training:
    """The loop.

    Attributes:
        epochs: passes over the training images.
        batch_size: images for one change of the weights, over all ranks and accumulated parts.
        accumulate: in how many parts a batch goes through the network, to save memory.
        label_smoothing: of the cross-entropy.
        ema: decay of the moving average of weights that is evaluated and kept; 0 for the weights themselves.
        seed: of initialisation, order and augmentation.
        precision: ``"float32"``, or the type of autocast; the penalty is summed in float32 in any case.
        checkpointing: compute activations twice rather than keep them.
        compile: run the step through ``torch.compile``.
        cuda_graph: capture the step in a CUDA graph and replay it.
        checkpoint_steps: steps between checkpoints; None for one at the end of each epoch.
    """

    epochs: int = 20
    batch_size: int = 50
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema: float = 0.0
    seed: int = 0
    precision: str = "float32"
    checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            check.count(name, getattr(self, name))
        if self.checkpoint_steps is not None:
            check.count("checkpoint_steps", self.checkpoint_steps)
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size must be a multiple of accumulate, {self.accumulate}")
        _fraction("label_smoothing", self.label_smoothing)
        _fraction("ema", self.ema)
        _number("seed", self.seed)
        if self.seed >= 2**63:
            raise ValueError("seed must be less than 2**63")
        check.one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Penalty:
    """What is added to the loss, and when.

    Attributes:
        method: as for :func:`gradl1_fast.training.methods.make`.
        epochs: number of final epochs with the penalty; 0 trains plainly.
        warmup_epochs: number of these in which the coefficients rise linearly.
        settings: of the method, such as ``lambda_w``, ``lambda_a``, ``scale`` and ``every`` of gradl1.
    """

    method: str = "gradl1"
    epochs: int = 10
    warmup_epochs: int = 0
    settings: dict[str, str | int | float | bool] = field(
        default_factory=lambda: {"lambda_w": 0.1, "lambda_a": 0.1, "scale": "step"}
    )

    def __post_init__(self) -> None:
        _number("epochs", self.epochs)
        _number("warmup_epochs", self.warmup_epochs)


@dataclass(frozen=True)
class Config:
    """A whole run; the defaults train the demo's network on handwritten digits in half a minute."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    penalty: Penalty = field(default_factory=Penalty)

    def __post_init__(self) -> None:
        if self.penalty.epochs > self.training.epochs:
            raise ValueError(
                f"penalty.epochs must be at most training.epochs, {self.training.epochs}, "
                f"got {self.penalty.epochs}; set --penalty-epochs as well as --epochs"
            )
        if self.optimizer.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs must be less than training.epochs, {self.training.epochs}"
            )
        if self.penalty.warmup_epochs > self.penalty.epochs:
            raise ValueError(f"penalty.warmup_epochs must be at most penalty.epochs, {self.penalty.epochs}")

    @classmethod
    def read(cls, path: Path) -> Config:
        """Return the configuration in a TOML file.

        Raises:
            SettingsError: names the file, the key and what is allowed.
            OSError: it cannot be read.
        """
        return toml.from_dict(cls, toml.read(path), str(path))

    def to_toml(self) -> str:
        """Return the configuration as a TOML file; :meth:`read` gives it back."""
        return toml.dumps(self)


_RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def recipe(name: str) -> Path:
    """Return the file of a recipe by name, or the path itself where it ends in ``.toml``.

    Raises:
        ValueError: there is no such recipe.
    """
    if name.endswith(".toml"):
        return Path(name)
    if name not in recipes():
        raise ValueError(
            f"recipe must be one of {', '.join(recipes())}, or a file that ends in .toml, got {name!r}"
        )
    return _RECIPES / f"{name}.toml"


def _number(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be from 0 to less than 1, got {value}")
