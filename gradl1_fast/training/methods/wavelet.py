"""One model for all widths: quantizes weights in the two bands of a Haar wavelet."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import WeightGrid, straight_through
from gradl1_fast.training.methods.several_widths import SeveralWidths

__all__ = ["HaarGrid", "Wavelet", "haar", "inverse_haar", "on_levels"]

ROOT = 2**-0.5


def haar(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return ``(w_0 + w_1) / sqrt 2`` and ``(w_0 - w_1) / sqrt 2`` of neighbours along an axis.

    Args:
        weight: a tensor of any shape; an odd number of entries along the axis is padded with zeros.
        axis: the axis; each band has half of its entries, rounded up.
    """
    moved = weight.movedim(axis, -1)
    if moved.shape[-1] % 2:
        moved = torch.nn.functional.pad(moved, (0, 1))
    even, odd = moved[..., ::2], moved[..., 1::2]
    return ((even + odd) * ROOT).movedim(-1, axis), ((even - odd) * ROOT).movedim(-1, axis)


def inverse_haar(sums: Tensor, differences: Tensor, axis: int, size: int) -> Tensor:
    """Return the weight of the two bands of :func:`haar`, with ``size`` entries along the axis."""
    a, d = sums.movedim(axis, -1), differences.movedim(axis, -1)
    pairs = torch.stack([(a + d) * ROOT, (a - d) * ROOT], -1)
    return pairs.flatten(-2)[..., :size].movedim(-1, axis)


def on_levels(x: Tensor, bits: int) -> Tensor:
    """Return x on ``2^bits`` evenly spaced levels from ``-max|x|`` to ``max|x|``.

    At 1 bit the levels are the mean magnitude with both signs.

    Straight-through: the gradient is that of the identity.
    """
    if bits == 1:
        signs = torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype)
        return straight_through(signs * x.detach().abs().mean(), x)
    end, steps = x.detach().abs().max().clamp(min=1e-30), 2**bits - 1
    unit = torch.round(steps * (x.detach() / (2 * end) + 0.5)) / steps
    return straight_through(end * (2 * unit - 1), x)


class HaarGrid(WeightGrid):
    """A parametrization: Haar transform along the input channels, quantization of each band, and inverse.

    Args:
        axis: the axis of the input channels.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`."""
        sums, differences = (on_levels(band, bits) for band in haar(weight, self.axis))
        return inverse_haar(sums, differences, self.axis, weight.shape[self.axis])


class Wavelet(SeveralWidths):
    """The sum of the losses at several widths, with weights quantized in the two bands of a Haar wavelet.

    A weight is a sum of two quantized values, so it has more levels than either: 3 from 2, 7 from 4, 15 from
    8. ``quantized(w, a)`` switches between the widths without training. Reconstruction: the placement and the
    axis of the wavelet, and equal weights of the losses, were chosen here; the levels are DoReFa's without
    the tanh.

    Args:
        model: a converted model.
        widths: bits from 1 to 8, a list or a text such as ``"8 4 2"``.
        coefficient: coefficient of the loss at each width but the widest.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Sun et al. 2021, arXiv 2105.01353.
    """

    name = "wavelet"
    text = "weights quantized in wavelet bands, several widths"
    source = "Sun et al. 2021, arXiv 2105.01353"
    reconstruction = True
    family = Family.WIDTHS
    variants = (
        Variant("wavelet", "one model for all: wavelet bands of the weights", {"widths": "8 6 4 3 2 1"}),
    )

    def grid_for(self, name: str, layer: QuantizedLayer) -> HaarGrid:
        """See :meth:`Quantizing.grid_for`."""
        return HaarGrid(1 - layer.out_axis)
