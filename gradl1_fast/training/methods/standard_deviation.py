"""Quantization intervals in units of the standard deviation, with a learned multiple."""

from __future__ import annotations

import math

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
    at_rate,
    straight_through,
)

__all__ = ["DeviationGrid", "DeviationSite", "StandardDeviation", "alpha_for", "pruned_share"]


def pruned_share(alpha: float, bits: int) -> float:
    """Return the share of a normal weight that is rounded to 0: ``erf(alpha / (2 sqrt(2) n))``.

    Args:
        alpha: end of the grid in standard deviations.
        bits: the width, 2 or more; ``n = 2^(bits-1) - 1``.
    """
    return math.erf(alpha / (2 * math.sqrt(2) * (2 ** (bits - 1) - 1)))


def alpha_for(share: float, bits: int) -> float:
    """Return the alpha that prunes a share of a normal weight, the inverse of :func:`pruned_share`."""
    inverse = torch.erfinv(torch.tensor(share, dtype=torch.float64))
    return float(2 * math.sqrt(2) * (2 ** (bits - 1) - 1) * inverse)


class DeviationGrid(WeightGrid):
    """A parametrization whose grid ends at ``alpha`` standard deviations of the weight.

    Uniform: ``s = alpha sigma / n`` and ``s clip(round(W / s), -n, n)``. Logarithmic: ``alpha sigma 2^k``
    with k a whole number from ``-(n - 1)`` to 0, rounded in the logarithm, and 0 below half the smallest
    level. The standard deviation is not differentiated; alpha has LSQ's gradient times ``1 / sqrt(n N)``.

    Args:
        weight: of any shape.
        alpha: initial alpha.
        logarithmic: whether to use the logarithmic grid.
        learned: whether alpha is trained.
    """

    def __init__(self, weight: Tensor, alpha: float, logarithmic: bool, learned: bool) -> None:
        super().__init__()
        self.logarithmic = logarithmic
        self.alpha = nn.Parameter(weight.new_tensor(alpha), requires_grad=learned)

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`; ``bits`` is 2 or more."""
        n = 2 ** (bits - 1) - 1
        end = at_rate(self.alpha, (n * weight.numel()) ** -0.5) * weight.detach().std()
        inside = (weight / end).clamp(-1, 1)
        level = _log_level(inside, n) if self.logarithmic else torch.round(inside * n) / n
        return straight_through(level, inside) * end


def _log_level(x: Tensor, n: int) -> Tensor:
    """Return the signed power of two near x in ``[-1, 1]``, with n magnitudes, or 0."""
    power = torch.round(torch.log2(x.abs().clamp(min=1e-30))).clamp(1 - n, 0)
    level = torch.sign(x) * torch.exp2(power)
    return torch.where(x.abs() < 2.0 ** (1 - n) / 2, torch.zeros_like(x), level)


class DeviationSite(SiteGrid):
    """Quantizes an activation from 0 to a learned multiple of a moving average of its standard deviation.

    The grid is symmetric if the activation has negative values.

    Args:
        alpha: initial alpha.
        like: a tensor of the type and device of the activations.
        learned: whether alpha is trained.

    Attributes:
        sigma: moving average of the standard deviation, a scalar; 0 before the first batch.
        signed: 1 if a negative value was observed.
    """

    sigma: Tensor
    signed: Tensor

    def __init__(self, alpha: float, like: Tensor, learned: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(like.new_tensor(alpha), requires_grad=learned)
        self.register_buffer("sigma", like.new_zeros(()))
        self.register_buffer("signed", like.new_zeros(()))

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """See :meth:`SiteGrid.forward`."""
        if self.training:
            self._follow(x.detach())
        n = torch.where(self.signed > 0, 2 ** (bits - 1) - 1, 2**bits - 1).clamp(min=1)
        end = at_rate(self.alpha, x.numel() ** -0.5) * self.sigma.clamp(min=1e-8)
        inside = (x / end).clamp(-1, 1)
        return straight_through(torch.round(inside * n) / n, inside) * end

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        deviation = x.std()
        self.sigma.copy_(torch.where(self.sigma == 0, deviation, self.sigma.lerp(deviation, MOMENTUM)))
        self.signed.copy_(torch.maximum(self.signed, (x.amin() < 0).to(x.dtype)))


class StandardDeviation(Quantizing):
    """The loss with grids that end at a learned multiple of the standard deviation of their tensor.

    The interval around 0 prunes weights; for a normal weight, the pruned share is a function of alpha and the
    width, see :func:`pruned_share`. With ``prune``, alpha is set for this share and not trained. After
    ``joint_steps`` steps, alpha is frozen and only the weights are trained. Reconstruction: grid, gradient
    and the two phases were derived here from the abstract.

    Args:
        model: a converted model.
        w: bits of the weights, 2 to 16.
        a: bits of the activations, None for float.
        logarithmic: use powers of two as the levels of weights.
        prune: share of the weights to prune, between 0 and 1; None to learn alpha.
        joint_steps: number of steps in which alpha is trained; 0 for all steps.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Ardakani et al. 2022, arXiv 2202.12422.
    """

    name = "deviation"
    text = "intervals in units of the standard deviation"
    source = "Ardakani et al. 2022, arXiv 2202.12422"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = (
        Variant("deviation-4", "learned multiple of the deviation at (4, 4)", {"w": 4, "a": 4}),
        Variant("deviation-3", "learned multiple of the deviation at (3, 3)", {"w": 3, "a": 3}),
        Variant(
            "deviation-log-4",
            "learned multiple of the deviation, powers of two, at (4, 4)",
            {"w": 4, "a": 4, "logarithmic": True},
        ),
        Variant(
            "deviation-pruned-4", "half of the weights pruned, at (4, 4)", {"w": 4, "a": 4, "prune": 0.5}
        ),
    )

    grids: dict[str, DeviationGrid]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        *,
        w: int,
        a: int | None,
        logarithmic: bool = False,
        prune: float | None = None,
        joint_steps: int = 0,
    ) -> None:
        check.bits(w, "StandardDeviation: w")
        if w < 2:
            raise ValueError(f"StandardDeviation: w must be from 2 to 16, got {w}")
        if prune is not None and not 0 < prune < 1:
            raise ValueError(f"StandardDeviation: prune must be between 0 and 1, got {prune}")
        self.logarithmic, self.learned = logarithmic, prune is None
        self.alpha = min(3.0, float(w)) if prune is None else alpha_for(prune, w)
        self.joint_steps = check.count("StandardDeviation: joint_steps", joint_steps, 0)
        super().__init__(model, [(w, a)])
        self._steps = 0

    def grid_for(self, name: str, layer: QuantizedLayer) -> DeviationGrid:
        """See :meth:`Quantizing.grid_for`."""
        return DeviationGrid(layer.weight, self.alpha, self.logarithmic, self.learned)

    def site_for(self, name: str, quantizer: ActivationQuantizer) -> DeviationSite:
        """See :meth:`Quantizing.site_for`."""
        return DeviationSite(3.0, quantizer.probe.detach(), True)

    def after_step(self) -> None:
        """Freeze alpha after the first phase."""
        self._steps += 1
        self._freeze()

    def _freeze(self) -> None:
        if self.joint_steps and self._steps >= self.joint_steps:
            for holder in (*self.grids.values(), *self.sites.values()):
                holder.alpha.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ranges and the number of steps."""
        return {**super().state_dict(), "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Load a state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._steps = int(state["steps"])
        self._freeze()
