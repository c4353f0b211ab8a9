"""What an experiment compares, and on what: settings, and the experiments by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradl1_fast.training.config import Config, recipe
from gradl1_fast.training.experiment.methods import initialiser_of, method_of, settings_of
from gradl1_fast.training.experiment.regimes import REGIMES, Width

__all__ = ["DEFAULT_REGIMES", "EXPERIMENTS", "WIDTHS", "Experiment", "named"]

WIDTHS: tuple[Width, ...] = (
    *((None, None), (8, 8), (6, 6), (4, 4), (3, 3), (2, 2), (3, 4), (2, 4)),
    *((4, None), (3, None), (2, None)),
)
QUICK_WIDTHS: tuple[Width, ...] = (None, None), (8, 8), (3, 3), (3, None)
DEFAULT_REGIMES = ("per tensor", "per channel", "calibrated")


@dataclass(frozen=True)
class Experiment:
    """What is compared, and on what.

    Attributes:
        config: of every network; ``training.seed`` and the penalty's method and settings are replaced.
        widths: bits of weights and of activations, None for float.
        regimes: keys of :data:`gradl1_fast.training.experiment.REGIMES`.
        calibration: number of training images to calibrate with, from the first on.
        probed: number of training images for the measurements.
        marks: measurements of norms in an epoch.
        alone_bits: width at which one tensor alone is quantized.
        images: number of training images and of test images to use; None for all.
    """

    config: Config
    widths: tuple[Width, ...] = WIDTHS
    regimes: tuple[str, ...] = DEFAULT_REGIMES
    calibration: int = 2000
    probed: int = 500
    marks: int = 4
    alone_bits: int = 3
    images: int | None = None

    @property
    def shared_epochs(self) -> int:
        """The first epochs, which no method changes."""
        return self.config.training.epochs - self.config.penalty.epochs

    def config_of(self, method: str, seed: int) -> Config:
        """Return the configuration of one run."""
        penalty = replace(
            self.config.penalty,
            method=method_of(method),
            settings=settings_of(method, self.config.penalty.settings),
        )
        model = self.config.model
        start = initialiser_of(method)
        if start is not None:
            model = replace(model, initialiser=start)
        training = replace(self.config.training, seed=seed)
        return replace(self.config, model=model, penalty=penalty, training=training)

    def settings_of(self, method: str, seed: int) -> dict[str, Any]:
        """Return everything that decides the result of one run, as it comes back from JSON."""
        others = asdict(replace(self, config=Config()))
        others.pop("config")
        config = asdict(self.config_of(method, seed))
        config["data"].pop("folder")  # where files lie decides nothing
        if config["model"]["initialiser"] is None:
            config["model"].pop("initialiser")  # runs of earlier versions have none
        widths = [list(width) for width in self.widths]
        return {**config, **others, "widths": widths, "regimes": list(self.regimes)}

    def quick(self) -> Experiment:
        """Return tiny settings that show that everything runs, no more."""
        config = replace(
            self.config,
            model=replace(self.config.model, width=4),
            training=replace(self.config.training, epochs=2, batch_size=50),
            penalty=replace(self.config.penalty, epochs=1, warmup_epochs=0),
            optimizer=replace(self.config.optimizer, warmup_epochs=0),
        )
        widths = QUICK_WIDTHS if self.widths == WIDTHS else self.widths
        return replace(self, config=config, widths=widths, calibration=100, probed=50, marks=1, images=200)


# By name, how many of the training images are used; None for all.
EXPERIMENTS: dict[str, int | None] = {
    "fashion-mnist": 20000,
    "fashion-mnist-depthwise": 20000,
    "fashion-mnist-resnet": 20000,
    "digits": None,
}


def named(
    name: str,
    folder: str | None = None,
    regimes: Sequence[str] = DEFAULT_REGIMES,
    widths: Sequence[Width] = WIDTHS,
) -> Experiment:
    """Return an experiment, made of the recipe of the same name.

    Args:
        name: a key of :data:`EXPERIMENTS`.
        folder: of the data; None for where they are usually found.
        regimes: keys of :data:`gradl1_fast.training.experiment.REGIMES`.
        widths: pairs ``(w, a)`` to evaluate at, None for float.

    Raises:
        ValueError: there is no such experiment, no such regime, or no width.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    unknown = [regime for regime in regimes if regime not in REGIMES]
    if unknown or not regimes:
        raise ValueError(f"regimes must be among {'; '.join(REGIMES)}; got {'; '.join(unknown) or 'none'}")
    if not widths:
        raise ValueError("widths must hold at least one pair of bits")
    config = Config.read(recipe(name))
    config = replace(config, data=replace(config.data, folder=folder))
    return Experiment(config, tuple(widths), tuple(regimes), images=EXPERIMENTS[name])
