"""What remains of a batch norm that was folded: residual sum, activation and quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast._checks import ACTIVATIONS, one_of
from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["Act2d"]


class Act2d(nn.Module):
    """``activation(x + residual)``, quantized: a :class:`BatchNormAct2d` without its normalisation.

    Args:
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        quantizer: of the output, or None.

    It has no parameters. Differentiable twice.
    """

    quantizer: ActivationQuantizer | None

    def __init__(self, activation: str = "none", quantizer: ActivationQuantizer | None = None) -> None:
        super().__init__()
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.quantizer = quantizer

    @classmethod
    def after_folding(cls, module: BatchNormAct2d) -> Act2d:
        """Return what is left to do of ``module``, with its quantizer and mode."""
        return cls(module.activation, module.quantizer).train(module.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(x + residual)`` at the present width."""
        y = x if residual is None else x + residual
        if self.activation == "relu":
            y = torch.relu(y)
        elif self.activation == "relu6":
            y = torch.nn.functional.relu6(y)
        return y if self.quantizer is None else self.quantizer(y)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"activation={self.activation}"
