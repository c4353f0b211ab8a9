"""Choosing the width at which a model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import named_quantizers

__all__ = ["bits", "set_bits"]


def set_bits(model: nn.Module, *, w: int | None, a: int | None) -> None:
    """Set the width of every weight and every activation; nothing is copied.

    Args:
        model: a converted model.
        w: bits of the weights, 1 to 16, or None for float.
        a: bits of the activations, likewise; needs :func:`calibrate` before.

    Raises:
        TypeError: a width is not an int or None.
        ValueError: a width is out of range, or wider than what was read of an any-bit file, or the model
            has no quantizers.
        RuntimeError: an activation has no range yet. The model is then as it was.
    """
    check_width("w", w)
    check_width("a", a)
    quantizers = _quantizers(model)
    uncalibrated = [name for name, q in named_quantizers(model).items() if q.low is None]
    if a is not None and uncalibrated:
        raise RuntimeError(
            f"no activation range for {', '.join(uncalibrated)}: "
            "call gradl1_fast.calibrate(model, batches) first"
        )
    widest = min((q.widest for q in quantizers if isinstance(q, WeightQuantizer)), default=check.MAX_BITS)
    if w is not None and w > widest:
        raise ValueError(
            f"w = {w}: the weights were read from an any-bit file with {widest} bits; read it again"
        )
    for quantizer in quantizers:
        quantizer.bits = w if isinstance(quantizer, WeightQuantizer) else a


@contextlib.contextmanager
def bits(model: nn.Module, *, w: int | None, a: int | None) -> Iterator[nn.Module]:
    """Set widths as :func:`set_bits` does, for the ``with`` block alone.

    Each quantizer then gets the width that it had, also after an exception.
    """
    before = [(quantizer, quantizer.bits) for quantizer in _quantizers(model)]
    set_bits(model, w=w, a=a)
    try:
        yield model
    finally:
        for quantizer, width in before:
            quantizer.bits = width


def _quantizers(model: nn.Module) -> list[WeightQuantizer | ActivationQuantizer]:
    found = [m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)]
    if not found:
        raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
    return found


def check_width(name: str, value: int | None) -> None:
    """Check a width: an int from 1 to 16, or None for float."""
    if value is not None:
        check.bits(value, f"{name} (None for float)")
