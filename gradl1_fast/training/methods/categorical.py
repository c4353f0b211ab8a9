"""CPQ: quantizes weights to the most probable grid point, with the gradient of the probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import Quantizing, WeightGrid, straight_through

__all__ = ["Categorical", "CategoricalGrid", "grid_indices", "probabilities"]

WIDEST = 8  # memory grows with the number of grid points


def grid_indices(bits: int) -> Tensor:
    """Return the whole numbers ``-2^(b-1) .. 2^(b-1) - 1``, of shape ``(2^b,)``."""
    half = 2 ** (bits - 1)
    return torch.arange(-half, half)


def probabilities(x: Tensor, grid: Tensor, step: Tensor, spread: Tensor) -> Tensor:
    """Return the probability of each grid point under logistic noise around x.

    ``r_i`` is proportional to ``sigmoid((g_i + step / 2 - x) / spread) - sigmoid((g_i - step / 2 - x) /
    spread)``.

    Args:
        x: a tensor of any shape; values outside of the grid are clamped to its ends.
        grid: ``(K,)``, the points g in ascending order.
        step: the distance of the points, a scalar.
        spread: the scale of the noise, a scalar.

    Returns:
        ``(*x.shape, K)``; each row sums to 1.
    """
    inside = x.clamp(grid[0].detach(), grid[-1].detach()).unsqueeze(-1)
    upper = torch.sigmoid((grid + step / 2 - inside) / spread)
    lower = torch.sigmoid((grid - step / 2 - inside) / spread)
    mass = upper - lower
    return mass / mass.sum(-1, keepdim=True)


class CategoricalGrid(WeightGrid):
    """A parametrization by the most probable grid point, with the gradient of the probabilities.

    With ``x = sum_i y_i g_i`` and a one-hot y, the gradient uses the probabilities r instead of y:
    ``dx/dw = sum_i g_i dr_i/dw`` over all points, or over the most probable one only (``mode_only``), where
    weights in the bin of zero get no gradient.

    Args:
        weight: of any shape; its range is the first grid.
        bits: the width, 1 to 8.
        mode_only: see above.

    Attributes:
        log_step: logarithm of the distance of grid points, a learned scalar.
        log_spread: logarithm of the noise's scale, a learned scalar; initially a third of the distance.
    """

    def __init__(self, weight: Tensor, bits: int, mode_only: bool = False) -> None:
        super().__init__()
        self.mode_only = mode_only
        step = weight.detach().abs().max().clamp(min=1e-8) / max(2 ** (bits - 1) - 1, 1)
        self.log_step = nn.Parameter(step.log())
        self.log_spread = nn.Parameter((step / 3).log())
        self.indices: Tensor
        self.register_buffer("indices", grid_indices(bits).to(weight.dtype), persistent=False)

    def masked(self, r: Tensor) -> Tensor:
        """Return the probabilities ``(..., K)`` after dropping points. The base class drops none."""
        return r

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`; ``bits`` is that of the constructor."""
        step, spread = self.log_step.exp(), self.log_spread.exp()
        grid = step * self.indices
        r = self.masked(probabilities(weight, grid, step, spread))
        chosen = nn.functional.one_hot(r.argmax(-1), r.shape[-1]).to(r.dtype)
        carried = chosen * r if self.mode_only else r
        return (straight_through(chosen, carried) * grid).sum(-1)


class Categorical(Quantizing):
    """The loss with weights as their most probable grid point, and the gradient of the probabilities.

    The distance of grid points and the scale of the noise are learned for each weight tensor. The gradient is
    small at grid points and large between them, so latent weights gather at grid points. Activation ranges
    are moving averages. Reconstruction: the probabilities and the estimator are from memory, and the
    estimator over all grid points was chosen here.

    Args:
        model: a converted model.
        w: bits of the weights, 1 to 8; takes 2^w values of memory per weight.
        a: bits of the activations, None for float.
        mode_only: use only the gradient of the most probable point.

    Raises:
        ValueError: a width is out of range, or the model is not converted.

    Source: Lee et al. 2021 (CPQ), arXiv 2109.02100.
    """

    name = "cpq"
    text = "cluster-promoting quantization at one width"
    source = "Lee et al. 2021, arXiv 2109.02100"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = tuple(
        Variant(f"cpq-{bits}", f"cluster-promoting quantization at ({bits}, {bits})", {"w": bits, "a": bits})
        for bits in (4, 3)
    )

    def __init__(self, model: nn.Module, *, w: int, a: int | None, mode_only: bool = False) -> None:
        check.bits(w, f"{type(self).__name__}: w")
        if w > WIDEST:
            raise ValueError(f"{type(self).__name__}: w must be from 1 to {WIDEST}, got {w}")
        self.mode_only = mode_only
        super().__init__(model, [(w, a)])

    def grid_for(self, name: str, layer: QuantizedLayer) -> CategoricalGrid:
        """See :meth:`Quantizing.grid_for`."""
        return CategoricalGrid(layer.weight, self.widths[0][0] or WIDEST, self.mode_only)
