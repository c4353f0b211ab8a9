"""The demo: twin networks, plain and penalised, quantized on demand, and the price in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from gradl1_fast import _environment
from gradl1_fast.quantization import Table, calibrate, sweep
from gradl1_fast.training.data import Dataset, digits
from gradl1_fast.training.demo.speed import Speed, measure
from gradl1_fast.training.loop.simple import Recipe, accuracy, train
from gradl1_fast.training.loop.threads import one_thread
from gradl1_fast.training.models import digits_net, resnet18

__all__ = ["PENALISED", "PLAIN", "Results", "Settings", "Spread", "run"]

PLAIN, PENALISED = "plain", "penalised"
ALL_BITS: tuple[int | None, ...] = (None, 8, 7, 6, 5, 4, 3, 2)

Stage = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes:
        seeds: number of pairs of networks; the seeds are 0, 1, ...
        bits: of weights and of activations, None for float; every pair of them is evaluated.
        width: of :func:`gradl1_fast.training.models.digits_net`.
        recipe: training of the penalised networks; the plain ones differ in the penalty alone.
        rounds: timed steps of each kind.
        speed_width: of the ResNet-18 whose steps are timed.
    """

    seeds: int = 5
    bits: tuple[int | None, ...] = ALL_BITS
    width: int = 16
    recipe: Recipe = field(default_factory=Recipe)
    rounds: int = 15
    speed_width: int = 16


@dataclass(frozen=True)
class Spread:
    """Accuracies over the seeds, in percent."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    def signed(self, digits: int = 1) -> str:
        """Return the mean with its sign, and zero as +0."""
        return f"{round(self.mean, digits) + 0.0:+.{digits}f}"

    def __str__(self) -> str:
        """Return the mean and, of several values, the ends."""
        if len(self.values) == 1:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ({min(self.values):.1f} to {max(self.values):.1f})"


@dataclass(frozen=True)
class Results:
    """What the demo found.

    Attributes:
        settings: what was run.
        tables: for each kind of network one table of accuracies a seed.
        speeds: step times, one entry for each network timed.
        seconds: how long each stage took.
        environment: versions, devices and environment variables.
    """

    settings: Settings
    tables: dict[str, list[Table]]
    speeds: list[Speed]
    seconds: dict[str, float]
    environment: dict[str, dict[str, str]]

    @property
    def minutes(self) -> float:
        """How long it took in all."""
        return sum(self.seconds.values()) / 60

    def spread(self, kind: str, w: int | None, a: int | None) -> Spread:
        """Return the accuracies of one kind of network at one width."""
        return Spread(tuple(table[w, a] for table in self.tables[kind]))

    def gain(self, w: int | None, a: int | None) -> Spread:
        """Return penalised minus plain, twin by twin."""
        pairs = zip(self.tables[PENALISED], self.tables[PLAIN], strict=True)
        return Spread(tuple(mine[w, a] - other[w, a] for mine, other in pairs))

    def mean_grid(self, kind: str) -> Table:
        """Return the accuracies of one kind of network, averaged over the seeds."""
        return Table(
            type(row)(row.w, row.a, self.spread(kind, row.w, row.a).mean) for row in self.tables[kind][0].rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, texts, lists and dictionaries, ready for JSON."""
        accuracies = [
            {"network": kind, "seed": seed, **vars(row)}
            for kind, tables in self.tables.items()
            for seed, table in enumerate(tables)
            for row in table.rows
        ]
        speeds = [
            {
                "network": speed.network,
                "penalty_disagreement": speed.disagreement,
                "steps": [
                    {"kind": k, "median_ms": speed.median(k), "ratio": speed.ratio(k), "times_ms": times}
                    for k, times in speed.times.items()
                ],
            }
            for speed in self.speeds
        ]
        return {
            "settings": asdict(self.settings),
            "environment": self.environment,
            "accuracy_percent": accuracies,
            "step_time": speeds,
            "seconds": self.seconds,
        }


def run(settings: Settings, stage: Stage = lambda what, total: lambda: None) -> Results:
    """Run the demo.

    Args:
        settings: see :class:`Settings`.
        stage: called with the name of a stage and its number of parts; returns what is called after
            each part. A progress bar fits.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    seconds: dict[str, float] = {}
    tables: dict[str, list[Table]] = {PLAIN: [], PENALISED: []}
    for seed in range(settings.seeds):
        data = digits(seed)
        for kind in tables:
            start = time.perf_counter()
            with one_thread():
                tables[kind].append(_one_network(kind, settings, data, seed, stage))
            seconds[f"{kind}, seed {seed}"] = time.perf_counter() - start
    start = time.perf_counter()
    with one_thread():
        speeds = _speeds(settings, stage)
    seconds["step times"] = time.perf_counter() - start
    return Results(settings, tables, speeds, seconds, _environment.describe())


def _one_network(kind: str, settings: Settings, data: Dataset, seed: int, stage: Stage) -> Table:
    """Train one network, calibrate it on the training images and evaluate it at every width."""
    recipe = settings.recipe if kind == PENALISED else settings.recipe.without_penalty()
    after_epoch = stage(f"seed {seed}: train {kind}", recipe.epochs)
    torch.manual_seed(seed)
    model = train(digits_net(settings.width), data.train, recipe, seed, lambda *_: after_epoch())
    calibrate(model, [data.train[0]])
    widths = [(w, a) for w in settings.bits for a in settings.bits]
    after_width = stage(f"seed {seed}: quantize {kind}", len(widths))

    def evaluate(quantized: nn.Module) -> float:
        after_width()
        return accuracy(quantized, data.test)

    return sweep(model, evaluate, widths, progress=False)


def _speeds(settings: Settings, stage: Stage) -> list[Speed]:
    images, labels = digits(0).train
    size = settings.recipe.batch_size
    torch.manual_seed(0)
    photos = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    after_round = stage("time the steps", 2 * (settings.rounds + 2))
    small = measure(
        f"the demo's network, {size} images of 8x8",
        lambda: digits_net(settings.width),
        (images[:size], labels[:size]),
        settings.rounds,
        after_round,
    )
    large = measure(
        f"ResNet-18 of width {settings.speed_width}, 32 images of 32x32, channels_last",
        lambda: _channels_last(resnet18(settings.speed_width)),
        (photos, torch.arange(32) % 10),
        settings.rounds,
        after_round,
    )
    return [small, large]


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
