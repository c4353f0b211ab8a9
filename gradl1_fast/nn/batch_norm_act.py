"""Batch normalisation with the activation, the residual sum and the quantizer that follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast._checks import ACTIVATIONS
from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.twins import retype

__all__ = ["BatchNormAct2d"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
}


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
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
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
            residual: added before the activation; where ``x`` is the one to be broadcast, or for a
                number, sum and activation are operations of their own.
        """
        self._check_input_dim(x)
        quantizer = self.quantizer
        if residual is not None and not _broadcasts(residual, x):
            y = _ACTIVATIONS[self.activation](self._normalize(x, None, "none") + residual)
        elif quantizer is not None and quantizer.is_foldable:
            bits = quantizer.bits
            grid = None if bits is None else quantizer.grid(sum_dtype(x.dtype), bits)
            return self._normalize(x, residual, self.activation, grid, quantizer.probe)
        else:
            y = self._normalize(x, residual, self.activation)
        return y if quantizer is None else quantizer(y)

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: str,
        grid: tuple[Tensor, Tensor, int, int] | None = None,
        probe: Tensor | None = None,
    ) -> Tensor:
        tracked = not self.training or self.track_running_stats
        return F.batch_norm_act(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=self._count_batch(),
            eps=self.eps,
            residual=residual,
            activation=activation,
            grid=grid,
            probe=probe,
        )

    def _count_batch(self) -> float:
        """Count a training batch and return its share in the running statistics."""
        if not (self.training and self.track_running_stats):
            return 0.0
        if self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average
            return 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        return self.momentum

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"{super().extra_repr()}, activation={self.activation}"


def _broadcasts(residual: Any, x: Tensor) -> bool:
    """Return whether ``residual`` is a tensor that can be expanded to the shape of ``x``."""
    if not isinstance(residual, Tensor) or residual.dim() > x.dim():
        return False
    sizes = zip(reversed(residual.shape), reversed(x.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in sizes)
