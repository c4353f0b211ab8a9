"""Keeps the codes of a layer whose weight is rescaled if they remain valid, and drops them otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gradl1_fast.nn.codes import along
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.rounded import MadeFor

__all__ = ["drop_rounding", "rescaled"]


def drop_rounding(layer: QuantizedLayer) -> bool:
    """Remove the codes of a layer at every width; return whether it had codes."""
    widths = list(layer.weight_quantizer.rounded)
    for bits in widths:
        layer.weight_quantizer.set_rounded(bits, None)
    return bool(widths)


@contextlib.contextmanager
def rescaled(layer: QuantizedLayer) -> Iterator[list[int]]:
    """Keep a layer's codes while the block multiplies each output channel of its weight by a factor.

    With one range per channel, the scale is multiplied too, and codes stay or change sign. Otherwise they are
    dropped. Codes that did not belong to the weight before remain invalid.

    Yields:
        The widths whose codes were dropped, after the block.
    """
    quantizer, dropped = layer.weight_quantizer, list[int]()
    before, had_clip = layer.weight, quantizer.clip is not None
    held = {b: c for b, c in quantizer.rounded.items() if _holds(layer, b)}
    values = before.detach().clone() if held else before
    yield dropped
    for bits, codes in held.items():
        fits = quantizer.axis is not None and had_clip == (quantizer.clip is not None)
        changed = _flipped(layer, bits, codes, values) if fits else None
        made_for = quantizer.made_for(bits)
        assert made_for is not None
        now = MadeFor.of(layer.weight, quantizer.clip, made_for.name)
        quantizer.set_rounded(bits, changed, now)
        if changed is None:
            dropped.append(bits)


def _holds(layer: QuantizedLayer, bits: int) -> bool:
    made_for = layer.weight_quantizer.made_for(bits)
    return made_for is not None and made_for.holds(layer.weight, layer.weight_quantizer.clip)


@torch.no_grad()
def _flipped(layer: QuantizedLayer, bits: int, codes: Tensor, before: Tensor) -> Tensor | None:
    """Return codes with the sign of each channel's factor; None at 1 bit, whose grid is not symmetric."""
    axis = layer.weight_quantizer.axis
    other = [i for i in range(before.dim()) if i != axis]
    sign = (before.double() * layer.weight.detach().double()).sum(other).sign()
    changed = (codes * along(sign, codes, axis)).to(codes.dtype)
    _, _, q_min, q_max = layer.weight_quantizer.grid(layer.weight.detach(), bits)
    return changed if bool(((changed >= q_min) & (changed <= q_max)).all()) else None
