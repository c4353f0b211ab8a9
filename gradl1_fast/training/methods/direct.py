"""Direct quantization: trains codes and levels without a latent float weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import (
    MOMENTUM,
    Quantizing,
    SiteGrid,
    WeightGrid,
    straight_through,
)

__all__ = ["Direct", "LevelCodes", "LevelSite", "nearest", "weighted_levels"]

WIDEST = 8  # memory grows with the number of levels


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level for each value.

    Args:
        x: of any shape.
        levels: of shape ``(K,)``, in ascending order.

    Returns:
        Integers from 0 to K - 1 in the shape of x.
    """
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def weighted_levels(x: Tensor, levels: Tensor, weights: Tensor, rounds: int = 3) -> Tensor:
    """Return levels of small error ``sum_c weights_c ||x_c - Q(x_c)||^2``, by alternating minimisation.

    Each round assigns values to their nearest level, then moves each level to the weighted mean of its
    values, which is the least-squares solution. A level without values is not changed.

    Args:
        x: ``(C, M)``, a row per channel.
        levels: ``(K,)``, the initial levels in ascending order.
        weights: ``(C,)``, the weights of the channels' errors.
        rounds: the number of rounds.
    """
    mass = weights[:, None].expand_as(x).flatten()
    for _ in range(rounds):
        codes = nearest(x, levels).flatten()
        total = torch.zeros_like(levels).index_add(0, codes, mass)
        sums = torch.zeros_like(levels).index_add(0, codes, mass * x.flatten())
        means = sums / total.clamp(min=torch.finfo(x.dtype).tiny)
        levels = torch.where(total > 0, means, levels).sort().values
    return levels


class LevelCodes(WeightGrid):
    """A parametrization of a weight by scores of its codes and by levels, without a float weight.

    ``W = sum_k y_k v_k``, where y is one-hot at the largest score and has the gradient of the softmax of the
    scores. The gradient of a level is the sum of the gradients of its weights.

    Both parameters are stored in units for which the learning rate of a float weight is right: a step of SGD
    moves a level by about the mean of the steps that its weights would take, and scores by about as much as
    they would change if the weight took its step.

    Args:
        bits: the width; there are ``K = 2^bits`` levels.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.count = 2**bits

    def forward(self, scores: Tensor, levels: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight, of shape S.

        Args:
            scores: of shape ``(*S, K)``, in units of half the spacing of the levels.
            levels: of shape ``(K,)``, in units of ``sqrt(K / N)`` for N weights.
        """
        levels = self.unit(scores[..., 0]) * levels
        scores = scores * (2 / _spacing(levels.detach()))
        chosen = nn.functional.one_hot(scores.argmax(-1), self.count).to(levels.dtype)
        return straight_through(chosen, torch.softmax(scores, -1)) @ levels

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and levels: evenly spaced levels, and scores that fall with the squared distance."""
        levels, spacing = _between(weight, weight.new_empty(self.count)), _spacing(weight, self.count)
        scores = -(((weight.unsqueeze(-1) - levels) / spacing) ** 2)
        return scores * (spacing / 2), levels / self.unit(weight)

    def unit(self, weight: Tensor) -> float:
        """Return the unit of the levels of a weight."""
        return float((self.count / weight.numel()) ** 0.5)


class LevelSite(SiteGrid):
    """Quantizes an activation to levels of small error in most channels.

    The error of each channel is weighted by the inverse of the channel's variance, so channels of large
    variance do not dominate. The levels are a moving average over batches with a weight of 0.1 for each new
    batch. The gradient passes between the lowest and the highest level.

    Args:
        bits: the width; there are 2^bits levels.
        like: a tensor of the type and device of the activations.

    Attributes:
        levels: of shape ``(2^bits,)``, ascending; all 0 before the first batch.
    """

    levels: Tensor

    def __init__(self, bits: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", like.new_zeros(2**bits))

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """See :meth:`SiteGrid.forward`. Channels are on axis 1."""
        if self.training:
            self._follow(x.detach())
        inside = x.clamp(self.levels[0], self.levels[-1])
        return straight_through(self.levels[nearest(x.detach(), self.levels)], inside)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        rows = x.transpose(0, 1).flatten(1)
        first = bool((self.levels == 0).all())
        start = self.levels if not first else _between(x, self.levels)
        new = weighted_levels(rows, start, _inverse_variance(rows))
        self.levels.copy_(new if first else self.levels.lerp(new, MOMENTUM))


def _inverse_variance(rows: Tensor) -> Tensor:
    """Return 1 / variance of each row, 0 of a row that is constant."""
    variance = rows.var(1, correction=0)
    return torch.where(variance > 1e-12, 1 / variance.clamp(min=1e-12), torch.zeros_like(variance))


def _spacing(x: Tensor, count: int | None = None) -> Tensor:
    """Return the distance of ``count`` levels (default: ``len(x)``) spaced evenly over the range of ``x``."""
    low, high = x.aminmax()
    return ((high - low) / ((count or len(x)) - 1)).clamp(min=1e-8)


def _between(x: Tensor, like: Tensor) -> Tensor:
    low, high = x.aminmax()
    return low + (high - low) * torch.linspace(0, 1, len(like), dtype=like.dtype, device=like.device)


class Direct(Quantizing):
    """The loss with weights as codes of learned levels, and activations quantized to their own levels.

    Codes and levels are trained directly: the parameters of a layer are scores of its codes, and levels,
    instead of the weight. After training, the weights are set to their levels. Reconstruction: scores, the
    softmax gradient and the weighting of channels were derived here from the abstract.

    Args:
        model: a converted model.
        w: bits of the weights, 1 to 8; takes 2^w values of memory per weight.
        a: bits of the activations, 1 to 8, or None for float.

    Raises:
        ValueError: a width is out of range, or the model is not converted.

    Source: Hoang et al. 2020, arXiv 2012.13762.
    """

    name = "direct"
    text = "trained codes and levels, channel-weighted activations"
    source = "Hoang et al. 2020, arXiv 2012.13762"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = tuple(
        Variant(f"direct-{bits}", f"direct quantization at ({bits}, {bits})", {"w": bits, "a": bits})
        for bits in (4, 3)
    )

    def __init__(self, model: nn.Module, *, w: int, a: int | None) -> None:
        for name, width in (("w", w), ("a", a)):
            if width is not None or name == "w":
                check.bits(width, f"Direct: {name}")
                if width > WIDEST:  # type: ignore[operator]
                    raise ValueError(f"Direct: {name} must be from 1 to {WIDEST}, got {width}")
        super().__init__(model, [(w, a)])

    def grid_for(self, name: str, layer: QuantizedLayer) -> LevelCodes:
        """See :meth:`Quantizing.grid_for`."""
        assert self.widths[0][0] is not None
        return LevelCodes(self.widths[0][0])

    def site_for(self, name: str, quantizer: ActivationQuantizer) -> LevelSite | None:
        """See :meth:`Quantizing.site_for`."""
        bits = self.widths[0][1]
        return None if bits is None else LevelSite(bits, quantizer.probe.detach())
