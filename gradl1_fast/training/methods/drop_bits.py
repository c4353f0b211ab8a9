"""DropBits: drops grid points in training, and can learn widths."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.categorical import Categorical, CategoricalGrid
from gradl1_fast.training.methods.interface import Family, Variant

__all__ = ["DropBits", "DroppedGrid", "expected_mask", "hard_concrete"]

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # ends of the stretched interval, and its temperature
SMALLEST = 2  # the points of this width are never dropped if widths are learned


def hard_concrete(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return stochastic masks in [0, 1] with positive probability at both ends.

    Args:
        logits: of the probability that a point is kept, of any shape.
        noise: uniform numbers from 0 to 1 in the same shape; None for the deterministic mask of evaluation.
    """
    if noise is not None:
        logits = (torch.logit(noise, 1e-6) + logits) / TEMPERATURE
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_mask(logits: Tensor) -> Tensor:
    """Return the probability that a mask is more than 0, in the shape of the logits."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


class DroppedGrid(CategoricalGrid):
    """The parametrization of CPQ with grid points dropped by random masks in training.

    Points ``i`` and ``-i`` share a mask, and zero is always kept. With ``learned`` there is one mask per
    width above 2: dropping width b removes the points of the b-bit grid that are not in the (b - 1)-bit grid,
    which has twice the distance. A dropped width also drops all wider ones.

    Args:
        weight: of any shape.
        bits: the widest width, 1 to 8.
        learned: whether masks belong to widths; see above.
        keep: initial probability of keeping a point.

    Attributes:
        logits: of the masks, learned: of shape ``(2^(b-1),)`` for the magnitudes from 1, or ``(b - 2,)`` for
            the widths from 3.
    """

    def __init__(self, weight: Tensor, bits: int, learned: bool, keep: float) -> None:
        super().__init__(weight, bits)
        self.top, self.learned = bits, learned
        count = max(bits - SMALLEST, 0) if learned else 2 ** (bits - 1)
        self.logits = nn.Parameter(torch.full((count,), math.log(keep / (1 - keep)), dtype=weight.dtype))

    def masks(self) -> Tensor:
        """Return a mask for each grid point, of shape ``(2^b,)``; random in training mode."""
        noise = torch.rand_like(self.logits) if self.training else None
        if not self.learned and noise is None:
            return torch.ones_like(self.indices)
        drawn = hard_concrete(self.logits, noise)
        kept = torch.cumprod(drawn, 0) if self.learned else drawn
        return torch.cat([kept.new_ones(1), kept])[self._places()]

    def _places(self) -> Tensor:
        """Return the index of each grid point's mask, 0 for points that are never dropped."""
        magnitudes = self.indices.abs().long()
        if not self.learned:
            return magnitudes
        twos = torch.zeros_like(magnitudes)  # number of factors of two in the index
        for power in range(1, self.top):
            twos += (magnitudes % 2**power == 0).long()
        return (self.top - twos - SMALLEST).clamp(min=0)

    def width(self) -> int:
        """Return the width of evaluation: the largest one whose mask is positive."""
        if not self.learned:
            return self.top
        kept = (hard_concrete(self.logits.detach()) > 0).long().cumprod(0)
        return min(SMALLEST, self.top) + int(kept.sum())

    def masked(self, r: Tensor) -> Tensor:
        """Return the probabilities without the dropped points, renormalised."""
        kept = r * self.masks()
        return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)


class DropBits(Categorical):
    """CPQ with randomly dropped grid points in training, which reduces the bias of its gradient.

    With ``penalty`` the masks belong to widths, and the loss includes ``penalty * sum (probability that a
    width is kept)``: each layer learns its width in evaluation, at most ``w``. Reconstruction: masks and
    penalty are from memory.

    Args:
        model: a converted model.
        w: bits of the weights, 1 to 8; the maximum if widths are learned.
        a: bits of the activations, None for float.
        penalty: coefficient of the learned widths; None drops single points instead.
        keep: initial probability of keeping a point, between 0 and 1.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Lee et al. 2021 (DropBits), arXiv 2109.02100.
    """

    name = "dropbits"
    text = "cluster-promoting quantization with dropped grid points"
    source = "Lee et al. 2021, arXiv 2109.02100"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = (
        Variant("dropbits-4", "DropBits at (4, 4)", {"w": 4, "a": 4}),
        Variant("dropbits-3", "DropBits at (3, 3)", {"w": 3, "a": 3}),
        Variant("dropbits-learned", "DropBits, learned widths to 4 bits", {"w": 4, "a": 4, "penalty": 0.01}),
    )

    grids: dict[str, DroppedGrid]  # type: ignore[assignment]

    def __init__(
        self, model: nn.Module, *, w: int, a: int | None, penalty: float | None = None, keep: float = 0.9
    ) -> None:
        self.coefficient = None if penalty is None else check.coefficient("DropBits: penalty", penalty)
        if not 0 < keep < 1:
            raise ValueError(f"DropBits: keep must be between 0 and 1, got {keep}")
        self.keep = keep
        super().__init__(model, w=w, a=a)

    def grid_for(self, name: str, layer: QuantizedLayer) -> DroppedGrid:
        """See :meth:`Quantizing.grid_for`."""
        bits = self.widths[0][0]
        assert bits is not None
        return DroppedGrid(layer.weight, bits, self.coefficient is not None, self.keep)

    def added(self, loss: Tensor) -> Tensor:
        """Return the penalty of the learned widths, or 0."""
        if self.coefficient is None:
            return loss.new_zeros(())
        kept = {f"{name}.bits": expected_mask(grid.logits).sum() for name, grid in self.grids.items()}
        self.parts = {name: each.detach() for name, each in kept.items()}
        return self.strength * self.coefficient * torch.stack(list(kept.values())).sum()

    def learned_widths(self) -> dict[str, int]:
        """Return the width of each layer's weight in evaluation."""
        return {name: grid.width() for name, grid in self.grids.items()}
