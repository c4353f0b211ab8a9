"""The folder of a run: its configuration, numbers, weights and ranges, and how they are loaded again.

``config.toml``, ``metrics.csv``, ``log.txt``, ``weights.safetensors``, ``ranges.safetensors``,
``report.html``, ``checkpoint/`` and ``tensorboard/``.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from gradl1_fast import _files
from gradl1_fast._safetensors import TensorFile
from gradl1_fast.conversion import convert
from gradl1_fast.quantization.ranges_file import load_ranges, save_ranges
from gradl1_fast.training import models
from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Dataset
from gradl1_fast.training.data import load as load_data
from gradl1_fast.training.runs.weights_file import open_weights, put_weights, save_weights

__all__ = ["Folder", "Loaded", "RunError", "load", "network"]


class RunError(ValueError):
    """A folder holds no finished run; the message says what is missing."""


@dataclass(frozen=True)
class Folder:
    """Where everything of a run is."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration, TOML."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """The numbers of each epoch."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """What happened, a line each."""
        return self.path / "log.txt"

    @property
    def weights(self) -> Path:
        """The float state dict of the finished run."""
        return self.path / "weights.safetensors"

    @property
    def ranges(self) -> Path:
        """The ranges of the finished run."""
        return self.path / "ranges.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The last state of a run that goes on."""
        return self.path / "checkpoint"

    @property
    def tensorboard(self) -> Path:
        """Events for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The page about the finished run."""
        return self.path / "report.html"

    def write_config(self, config: Config) -> None:
        """Write the configuration."""
        _files.write_text(self.config, config.to_toml())

    def write_model(self, model: nn.Module, data: Dataset) -> None:
        """Write weights and ranges of a converted, calibrated model."""
        save_ranges(model, self.ranges)
        facts = {"classes": data.classes, "channels": data.channels}
        save_weights(model.state_dict(), self.weights, {key: str(value) for key, value in facts.items()})


@dataclass(frozen=True)
class Loaded:
    """A finished run.

    Attributes:
        config: what it was made of.
        model: converted, with its ranges, in float and in evaluation mode, on the CPU.
    """

    config: Config
    model: nn.Module

    @cached_property
    def data(self) -> Dataset:
        """Its data set, read when it is first asked for."""
        return load_data(self.config.data.name, self.config.data.folder, size=self.config.data.size)


def network(config: Config, classes: int, channels: int) -> nn.Module:
    """Return the converted network of a configuration, with random weights from torch's generator."""
    settings = config.model
    model = models.build(
        settings.name, classes=classes, channels=channels, width=settings.width, stem=settings.stem
    )
    if settings.initialiser is not None:
        models.initialise(model, settings.initialiser)
    return convert(model, per_channel=settings.per_channel)


def load(folder: str | os.PathLike[str]) -> Loaded:
    """Load a finished run.

    Args:
        folder: that ``gradl1 train`` wrote.

    Raises:
        RunError: it holds no finished run.
        ValueError: one of its files is damaged or does not fit the others; the message names the file
            and the entry.
    """
    run = Folder(Path(folder))
    missing = [path.name for path in (run.config, run.weights, run.ranges) if not path.is_file()]
    if missing:
        hint = (
            " (its training has not finished; run gradl1 train --resume)" if run.checkpoints.is_dir() else ""
        )
        raise RunError(f"{run.path}: not the folder of a finished run: no {' and no '.join(missing)}{hint}")
    config = Config.read(run.config)
    with open_weights(run.weights) as weights:
        counts = _count(weights, "classes"), _count(weights, "channels")
        _check_size(run, config, counts, weights)
        model = network(config, *counts)
        put_weights(model, weights)
    load_ranges(model, run.ranges)
    return Loaded(config, model.eval())


def _check_size(run: Folder, config: Config, counts: tuple[int, int], weights: TensorFile) -> None:
    """Compare the weights with a network that takes no memory: a damaged configuration may ask for any."""
    if config.model.name.startswith("timm:"):  # some of those compute with values while they are made
        return
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say is said about the network itself
            expected = network(config, *counts).state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{run.config}: unknown network: {error!s:.300}") from error
    weights.check_like(expected)


def _count(weights: TensorFile, name: str) -> int:
    text = weights.metadata(name)
    if not text.isdecimal() or len(text) > 6 or not int(text):
        raise RunError(f"{weights.path}: must say how many {name} there are, says {text!r:.80}")
    return int(text)
