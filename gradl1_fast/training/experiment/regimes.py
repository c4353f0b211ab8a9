"""How a trained network is quantized without training: what is known of the data, and what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization import (
    bits,
    calibrate,
    calibrate_weights,
    ranges,
    reestimate_batch_norm,
    round_weights,
)
from gradl1_fast.quantization.calibration import set_per_channel

__all__ = ["OWN", "REGIMES", "Regime", "evaluate"]

Width = tuple[int | None, int | None]
OWN = "own quantizer"  # of a method that quantizes in training, at the widths that it trained for


@dataclass(frozen=True)
class Regime:
    """What may be used, and how.

    Attributes:
        text: for a reader.
        per_channel: whether each output channel of a weight has a range.
        calibrated: whether unlabelled training images serve to find ranges and batch-norm statistics;
            otherwise ranges come from the batch norms, and statistics stay those of training.
        rounding: of the weights beyond nearest, see :func:`gradl1_fast.round_weights`; None for nearest.
    """

    text: str
    per_channel: bool
    calibrated: bool
    rounding: str | None = None


REGIMES = {
    "per tensor": Regime(
        "no data: one range a weight tensor, activation ranges from batch norms", False, False
    ),
    "per channel": Regime(
        "no data: one range for each output channel, activation ranges from batch norms", True, False
    ),
    "calibrated": Regime(
        "unlabelled images: one range for each output channel, activation ranges of least squared error, "
        "batch-norm statistics re-estimated at each width",
        True,
        True,
    ),
    "calibrated, gptq": Regime("as calibrated, weights rounded by GPTQ at each width", True, True, "gptq"),
}


def evaluate(
    regime: Regime,
    model: nn.Module,
    images: Tensor,
    widths: Sequence[Width],
    accuracy: Callable[[nn.Module], float],
    batch_size: int,
) -> list[float]:
    """Return the accuracy at each width; the model stays as it is.

    Args:
        regime: what is done.
        model: converted, trained, in evaluation mode.
        images: of the training set, for calibration; without data only their smallest and largest value,
            which images have anyhow, is used.
        widths: pairs ``(w, a)``.
        accuracy: of a model at its present width.
        batch_size: images in a batch of calibration.
    """
    copy = copy_converted(model)
    set_per_channel(copy, regime.per_channel)
    batches = images.split(batch_size)
    if regime.calibrated:
        calibrate(copy, batches, ranges="mse")
    else:
        ends = float(images.min()), float(images.max())
        known = {name: ends for name, quantizer in named_quantizers(copy).items() if quantizer.is_input}
        calibrate(copy, ranges=ranges.BatchNormStatistics(known=known))
    calibrate_weights(copy, ranges="mse")
    return [_at(regime, copy, batches, width, accuracy) for width in widths]


def _at(
    regime: Regime,
    model: nn.Module,
    batches: Sequence[Tensor],
    width: Width,
    accuracy: Callable[[nn.Module], float],
) -> float:
    w, a = width
    if regime.rounding is not None and w is not None:
        round_weights(model, batches, w=w, a=a, method=regime.rounding)
    with bits(model, w=w, a=a):
        if regime.calibrated and width != (None, None):
            reestimate_batch_norm(model, batches)
        return accuracy(model)
