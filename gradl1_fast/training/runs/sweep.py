"""A finished run at every width: accuracies, what each tensor loses alone, ranges and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast import functional
from gradl1_fast._progress import track
from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization import (
    Folding,
    Plan,
    Sensitivity,
    Table,
    calibrate,
    calibrate_weights,
    clear_rounding,
    fold_batch_norm,
    ranges,
    round_weights,
    search,
    sensitivity,
    sweep,
)
from gradl1_fast.quantization.calibration import set_per_channel
from gradl1_fast.quantization.preparation import NARROW
from gradl1_fast.training.data import Batch, Dataset
from gradl1_fast.training.loop.norms import step_norms

__all__ = ["BITS", "Results", "Settings", "run"]

BITS: tuple[int | None, ...] = (None, 8, 6, 5, 4, 3, 2)
_BATCH = 200
_CALIBRATION_IMAGES, _NORM_IMAGES = 1000, 200


@dataclass(frozen=True)
class Settings:
    """What :func:`run` does.

    Attributes:
        bits: of weights and of activations, None for float; every pair is evaluated.
        alone: the width at which each tensor is quantized alone.
        images: test images to evaluate on, evenly spread over all; None for all.
        ranges: how to recompute the activation ranges, by name; None keeps those of the run.
        weight_ranges: how to find ranges of weights, by name; None keeps those of the run.
        fold: fold batch norms first.
        prepare: do what :func:`gradl1_fast.prepare` does, with ranges of least squared error unless others
            are named. Narrow weights are rounded by GPTQ once for each width, for activations in float.
        size: budget for the bytes of the weights of a mixed-precision search, or None.
    """

    bits: tuple[int | None, ...] = BITS
    alone: int = 4
    images: int | None = 2000
    ranges: str | None = None
    weight_ranges: str | None = None
    fold: bool = False
    prepare: bool = False
    size: float | None = None


@dataclass(frozen=True)
class Results:
    """What :func:`run` found.

    Attributes:
        settings: what was asked for.
        images: number of test images evaluated.
        table: test accuracy in percent at each pair of widths.
        alone: mean cross-entropy on the test images with one tensor quantized.
        ends: range of each tensor at ``settings.alone`` bits: weights by ``<layer>.weight``, activations by
            quantizer.
        norms: step at ``settings.alone`` bits times the l1 norm of the gradient, by the same names.
        folding: what was folded, or None.
        plan: the mixed-precision search, or None.
    """

    settings: Settings
    images: int
    table: Table
    alone: Sensitivity
    ends: dict[str, tuple[float, float]]
    norms: dict[str, float]
    folding: Folding | None
    plan: Plan | None


def run(model: nn.Module, data: Dataset, settings: Settings, *, progress: bool = True) -> Results:
    """Evaluate a finished run; see :class:`Settings`.

    Args:
        model: converted, calibrated, in float and in evaluation mode; recomputed ranges are set.
        data: of the run.
        settings: what to do.
        progress: show progress bars where there is a terminal.

    Raises:
        ValueError: a name of ranges is unknown, a width is out of range, or the budget cannot be kept.
    """
    check.bits(settings.alone, "alone")
    test = _spread(data.test, settings.images)
    train = _spread(data.train, _CALIBRATION_IMAGES)
    activation_ranges, weight_ranges = settings.ranges, settings.weight_ranges
    if settings.prepare:
        model = copy_converted(model)
        set_per_channel(model, True)
        activation_ranges, weight_ranges = activation_ranges or "mse", weight_ranges or "mse"
    if activation_ranges is not None:  # before folding, which leaves no batch norms to find ranges from
        _calibrate(model, train[0], activation_ranges)
    folding = fold_batch_norm(model, train[0][:_BATCH]) if settings.fold else None
    model = model if folding is None else folding.model
    if weight_ranges is not None:
        calibrate_weights(model, ranges=weight_ranges)
    batches = list(zip(test[0].split(_BATCH), test[1].split(_BATCH), strict=True))
    widths = [(w, a) for w in settings.bits for a in settings.bits]
    # First, since it may be refused.
    plan = None if settings.size is None else _search(model, batches, settings.size, progress)
    reestimate = train[0].split(_BATCH) if settings.prepare else None
    table = _table(model, batches, widths, reestimate, progress)
    bits = (settings.alone,)
    return Results(
        settings,
        len(test[1]),
        table,
        sensitivity(model, lambda m: _loss(m, batches), w=bits, a=bits, progress=progress),
        _ends(model, settings.alone),
        _norms(model, _spread(data.train, _NORM_IMAGES), settings.alone),
        folding,
        plan,
    )


def _table(
    model: nn.Module,
    batches: list[Batch],
    widths: list[tuple[int | None, int | None]],
    images: Sequence[Tensor] | None,
    progress: bool,
) -> Table:
    """Return the accuracy at each pair of widths, with images after rounding and re-estimation for them."""
    if images is not None:
        narrow = {w for w, _ in widths if w is not None and w <= NARROW}
        for w in track(narrow, "rounding", show=progress):
            round_weights(model, images, w=w)
    table = sweep(model, _right, widths, batches=batches, reestimate=images, progress=progress)
    clear_rounding(model)
    return table


def _calibrate(model: nn.Module, images: Tensor, name: str) -> None:
    if name != "batch_norm":
        calibrate(model, images.split(_BATCH), ranges=name)
        return
    # No batch norm says what the images are like; they are data, and known.
    inputs = [name for name, q in named_quantizers(model).items() if q.is_input]
    ends = float(images.min()), float(images.max())
    calibrate(model, ranges=ranges.BatchNormStatistics(known=dict.fromkeys(inputs, ends)))


def _spread(data: Batch, count: int | None) -> Batch:
    """Return ``count`` examples, evenly spread, so that sorted data give examples of every class."""
    images, labels = data
    if count is None or count >= len(labels):
        return data
    places = torch.linspace(0, len(labels) - 1, count).round().long()
    return images[places], labels[places]


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(next(model.parameters()).device)).float().cpu()


@torch.no_grad()
def _right(model: nn.Module, batch: Batch) -> tuple[float, int]:
    return 100.0 * int((_logits(model, batch[0]).argmax(1) == batch[1]).sum()), len(batch[1])


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean cross-entropy."""
    total = sum(float(F.cross_entropy(_logits(model, x), y, reduction="sum")) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def _search(model: nn.Module, batches: Sequence[Batch], size: float, progress: bool) -> Plan:
    return search(model, lambda m: _loss(m, batches), size=size, higher_is_better=False, progress=progress)


@torch.no_grad()
def _ends(model: nn.Module, bits: int) -> dict[str, tuple[float, float]]:
    found = {}
    for name, layer in named_layers(model).items():
        clip = layer.weight_quantizer.clip
        low, high = functional.value_range(layer.weight)
        if clip is not None:
            high = clip[min(bits, len(clip)) - 1].max()
            low = -high
        found[f"{name}.weight".removeprefix(".")] = float(low), float(high)
    for name, quantizer in named_quantizers(model).items():
        low, high = quantizer.range_at(bits)
        found[name] = float(low), float(high)
    return found


def _norms(model: nn.Module, data: Batch, bits: int) -> dict[str, float]:
    def loss() -> Tensor:
        device = next(model.parameters()).device
        return F.cross_entropy(model(data[0].to(device)), data[1].to(device))

    return {name: float(value) for name, value in step_norms(model, loss, bits).items()}
