"""Vertical layering: trains nested codes of a weight at several widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.quantization import bit_planes
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import WeightGrid, at_rate, straight_through
from gradl1_fast.training.methods.several_widths import SeveralWidths

__all__ = ["NestedCodes", "VerticalLayering"]

LARGEST = 2 ** (bit_planes.WIDTH - 1) - 1  # code of the largest weight


class NestedCodes(WeightGrid):
    """A parametrization whose w-bit codes are the first w bits of one 8-bit code, as in an any-bit file.

    The weight is rounded once to ``c = clip(round(W / s), -127, 127)``; ``c + 128`` is a byte, and a code of
    w bits is decoded as the midpoint of the bytes that start with it. The clip ``127 s`` is learned with
    LSQ's gradient: ``c_w - W / s`` inside of the range and the end code outside, times ``1 / sqrt(127 N)``.

    Args:
        weight: of any shape; its largest magnitude is the first clip.

    Attributes:
        clip: the learned largest weight, a scalar.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.clip = nn.Parameter(weight.detach().abs().max().clamp(min=1e-8))
        self.rate = (LARGEST * weight.numel()) ** -0.5

    def scale(self) -> Tensor:
        """Return the scale of the 8-bit grid, a scalar with its graph."""
        return at_rate(self.clip, self.rate) / LARGEST

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`; ``bits`` is 1 to 8."""
        scale = self.scale()
        inside = (weight / scale).clamp(-LARGEST, LARGEST)
        byte = torch.round(inside.detach()) + (LARGEST + 1)
        cut = 2 ** (bit_planes.WIDTH - bits)
        middle = torch.floor(byte / cut) * cut + ((cut - 1) / 2 - (LARGEST + 1))
        return straight_through(middle, inside) * scale


class VerticalLayering(SeveralWidths):
    """The sum of the losses at several widths, whose codes are nested bit planes of one 8-bit code.

    After training, each layer's quantizer keeps the learned range, so ``gl.save_any_bit`` writes the trained
    planes bit for bit. Each weight tensor has one scale. Reconstruction: truncating each width from the next
    wider one and training all together is from the abstract; the rounding of codes is that of any-bit files,
    and equal weights of the losses were chosen here.

    Args:
        model: a converted model.
        widths: bits from 1 to 8, a list or a text such as ``"8 4 2"``.
        coefficient: coefficient of the loss at each width but the widest.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Wu et al. 2022, arXiv 2212.05326.
    """

    name = "vertical"
    text = "nested bit planes of one code"
    source = "Wu et al. 2022, arXiv 2212.05326"
    reconstruction = True
    family = Family.WIDTHS
    variants = (Variant("vertical", "vertical layering: nested bit planes", {"widths": "8 6 4 3 2"}),)

    grids: dict[str, NestedCodes]  # type: ignore[assignment]

    def grid_for(self, name: str, layer: QuantizedLayer) -> NestedCodes:
        """See :meth:`Quantizing.grid_for`."""
        return NestedCodes(layer.weight)

    def close(self) -> None:
        """Restore the float weights, and store the learned ranges in the layers' quantizers."""
        super().close()
        for name, grid in self.grids.items():
            clip = grid.clip.detach().abs()
            self.layers[name].weight_quantizer.set_clip(clip.reshape(1, 1))
