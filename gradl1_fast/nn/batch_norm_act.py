"""Batch normalisation with the activation, the residual sum and the quantizer that follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.twins import retype

__all__ = ["BatchNormAct2d"]


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, an optional residual sum and an activation in one twice differentiable operation.

    Args:
        *args: as for ``nn.BatchNorm2d``.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        quantize_output: own a quantizer for the output.
        **kwargs: as for ``nn.BatchNorm2d``.

    The state dict has the keys of ``nn.BatchNorm2d``. Running statistics are updated once a call.
    """

    quantizer: ActivationQuantizer | None

    def __init__(
        self, *args: Any, activation: str = "none", quantize_output: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add(activation, quantize_output)

    def _add(self, activation: str, quantize_output: bool) -> None:
        if activation not in F.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(F.ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.quantizer = ActivationQuantizer() if quantize_output else None
        if self.quantizer is not None and self.running_mean is not None:
            self.quantizer.to(self.running_mean)

    @classmethod
    def from_float(
        cls, module: nn.Module, *, activation: str = "none", quantize_output: bool = False
    ) -> BatchNormAct2d:
        """Return this layer with the parameters, buffers, hooks and mode of an ``nn.BatchNorm2d``.

        Raises:
            TypeError: ``module`` is not exactly an ``nn.BatchNorm2d``.
        """
        layer = retype(module, nn.BatchNorm2d, cls)
        layer._add(activation, quantize_output)
        return layer

    def to_float(self) -> nn.BatchNorm2d:
        """Return the ``nn.BatchNorm2d`` with the same parameters; the activation is not part of it."""
        return retype(self, type(self), nn.BatchNorm2d, without=("quantizer", "activation"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(batch_norm(x) + residual)`` at the present width.

        Args:
            x: ``(N, C, H, W)``.
            residual: added before the activation; must broadcast to ``x``.
        """
        self._check_input_dim(x)
        folded = self.quantizer is not None and self.quantizer.is_plain_tap
        tracked = not self.training or self.track_running_stats
        y = F.batch_norm_act(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=self._count_batch(),
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            probe=self.quantizer.probe if folded and self.quantizer is not None else None,
        )
        return y if folded or self.quantizer is None else self.quantizer(y)

    def _count_batch(self) -> float:
        """Count a training batch and return its share in the running statistics."""
        if not (self.training and self.track_running_stats):
            return 0.0
        if self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"{super().extra_repr()}, activation={self.activation}"
