"""Blended gradient descent: pulls latent weights towards their codes, and keeps the best iterate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Closure, Family, Scale, Terms, Variant, identity
from gradl1_fast.training.methods.quantizing import Quantizing, WeightGrid, straight_through
from gradl1_fast.training.methods.weights import leaf_of

__all__ = ["ProjectedGrid", "Recurrence", "projected"]

TERNARY_THRESHOLD = 0.7  # of the mean magnitude


def projected(weight: Tensor, bits: int) -> Tensor:
    """Return a weight on the grid of a width, with the least-squares scale.

    1 bit: the sign; 2 bits: -1, 0, 1 with a threshold of 0.7 times the mean magnitude; more: the nearest of
    ``-n .. n`` times ``max|W| / n``. The scale is then ``sum |W| q / sum q^2`` of the magnitudes q.

    Args:
        weight: of any shape.
        bits: 1 to 16.
    """
    magnitude = weight.abs()
    if bits == 1:
        codes = torch.ones_like(weight)
    elif bits == 2:
        codes = (magnitude > TERNARY_THRESHOLD * magnitude.mean()).to(weight.dtype)
    else:
        codes = torch.round(magnitude / magnitude.max().clamp(min=1e-30) * (2 ** (bits - 1) - 1))
    scale = (magnitude * codes).sum() / codes.square().sum().clamp(min=1e-30)
    return scale * codes * torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


class ProjectedGrid(WeightGrid):
    """A parametrization by :func:`projected`; the latent weight gets the gradient of the quantized one."""

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`."""
        return straight_through(projected(weight.detach(), bits), weight)


class Recurrence(Quantizing):
    """Latent weights take a gradient step computed at their codes, and move slightly towards the codes.

    ``W <- (1 - rho) W + rho Q(W) - step(grad L at Q(W))``. The codes need not converge, but visit the optimum
    repeatedly, so the best iterate is kept instead of the last one: the model at the end of the window of
    steps with the lowest mean loss. ``rho=0`` is BinaryConnect. Reconstruction: the blended step is from the
    authors' code; the choice of the best iterate by windows of training losses was made here.

    Args:
        model: a converted model.
        w: bits of the weights.
        a: bits of the activations, None for float.
        rho: weight of the codes in the blend, 0 to 1.
        window: number of steps per window.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Long et al. 2020, arXiv 2012.05529; Yin et al. 2018, arXiv 1808.05240.
    """

    name = "recurrence"
    text = "blended iteration, best iterate kept"
    source = "Long et al. 2020, arXiv 2012.05529"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = (
        Variant("recurrence-4", "blended iteration at (4, 4), best iterate", {"w": 4, "a": 4}),
        Variant("recurrence-2", "blended iteration at (2, 4), best iterate", {"w": 2, "a": 4}),
    )

    def __init__(
        self, model: nn.Module, *, w: int, a: int | None, rho: float = 1e-5, window: int = 50
    ) -> None:
        check.bits(w, "Recurrence: w")
        if not 0 <= rho <= 1:
            raise ValueError(f"Recurrence: rho must be from 0 to 1, got {rho}")
        self.rho, self.window = rho, check.count("Recurrence: window", window)
        super().__init__(model, [(w, a)])
        self._moves: list[tuple[Tensor, Tensor]] = []
        self._losses: list[Tensor] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss: Tensor | None = None

    def grid_for(self, name: str, layer: QuantizedLayer) -> ProjectedGrid:
        """See :meth:`Quantizing.grid_for`."""
        return ProjectedGrid()

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. Stores the blend of the current weights for :meth:`after_step`."""
        terms = super().backward(closure, scale)
        bits = self.widths[0][0] or 1
        leaves = {id(leaf): leaf for leaf in map(leaf_of, self.layers.values())}.values()
        with torch.no_grad():
            self._moves = [(leaf, self.rho * (projected(leaf, bits) - leaf)) for leaf in leaves]
        self._losses.append(terms.loss)
        return terms

    def after_step(self) -> None:
        """Blend the latent weights, and keep the model at the end of the best window."""
        with torch.no_grad():
            for leaf, move in self._moves:
                leaf.add_(move)
        self._moves = []
        if len(self._losses) >= self.window:
            mean = torch.stack(self._losses).mean()
            self._losses = []
            if self.best_loss is None or mean < self.best_loss:
                self.best_loss = mean
                self.best = {key: value.clone() for key, value in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return ranges, the losses of the current window, and the best iterate so far."""
        state = {**super().state_dict(), **{f"best.{key}": value for key, value in self.best.items()}}
        if self._losses:
            state["losses"] = torch.stack(self._losses)
        return state if self.best_loss is None else {**state, "best_loss": self.best_loss}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._losses = list(state["losses"].unbind()) if "losses" in state else []
        self.best_loss = state.get("best_loss")
        self.best = {
            key.removeprefix("best."): value.clone()
            for key, value in state.items()
            if key.startswith("best.")
        }

    def close(self) -> None:
        """Restore the best iterate, if there is one."""
        if self.best:
            self.model.load_state_dict(self.best)
            self.best = {}
        super().close()
