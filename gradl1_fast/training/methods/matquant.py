"""MatQuant: trains slices of 8-bit codes together."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import WeightGrid, straight_through
from gradl1_fast.training.methods.several_widths import SeveralWidths

__all__ = ["MatQuant", "SlicedCodes", "sliced"]

WIDEST = 8


def sliced(codes: Tensor, bits: int) -> Tensor:
    """Return ``clip(round(q / 2^(8-b)), 0, 2^b - 1) 2^(8-b)``: the first b bits of codes, rounded.

    Args:
        codes: integers from 0 to 255, of any shape.
        bits: 1 to 8.
    """
    cell = 2 ** (WIDEST - bits)
    return torch.round(codes / cell).clamp(0, 2**bits - 1) * cell


class SlicedCodes(WeightGrid):
    """A parametrization that quantizes a weight to 8 bits between its ends, and slices the codes."""

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`. Straight-through: the gradient is that of the latent weight."""
        low, high = weight.detach().aminmax()
        scale = ((high - low) / (2**WIDEST - 1)).clamp(min=1e-12)
        codes = torch.round((weight.detach() - low) / scale)
        return straight_through(low + scale * sliced(codes, bits), weight)


class MatQuant(SeveralWidths):
    """The sum of the losses at several widths, whose codes are slices of one 8-bit code.

    Unlike bit planes, slices are rounded, so codes of a width are not the first bits of wider codes.
    Reconstruction: the slice is from memory, and equal weights of the losses were chosen here.

    Args:
        model: a converted model.
        widths: bits from 1 to 8, a list or a text such as ``"8 4 2"``.
        coefficient: coefficient of the loss at each width but the widest.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Nair et al. 2025, arXiv 2502.06786.
    """

    name = "matquant"
    text = "slices of one 8-bit code"
    source = "Nair et al. 2025, arXiv 2502.06786"
    reconstruction = True
    family = Family.WIDTHS
    variants = (Variant("matquant", "MatQuant: slices of one 8-bit code", {"widths": "8 4 2"}),)

    def grid_for(self, name: str, layer: QuantizedLayer) -> SlicedCodes:
        """See :meth:`Quantizing.grid_for`."""
        return SlicedCodes()
