"""Quantizer modules: widths, ranges and probes. They hold no parameter and nothing in the state dict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast._dtypes import sum_dtype

__all__ = ["ActivationQuantizer", "Observer", "WeightQuantizer"]


class Observer(Protocol):
    """What watches the tensors that reach a quantizer while it is calibrated."""

    def update(self, x: Tensor) -> None:
        """Take note of one batch."""


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight to ``bits``, with codes around zero and the weight's own range.

    Args:
        per_channel: one range for each output channel (axis 0) rather than one for the tensor.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
    """

    def __init__(self, *, per_channel: bool = False) -> None:
        super().__init__()
        self.axis = 0 if per_channel else None
        self.bits: int | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as it is used at the present width."""
        if self.bits is None:
            return weight
        low, high = F.value_range(weight.detach(), self.axis)
        scale, zero_point, q_min, q_max = F.quantization_grid(low, high, self.bits, symmetric=True)
        return F.fake_quantize(weight, scale, zero_point, q_min, q_max, axis=self.axis)

    def step(self, weight: Tensor, bits: int) -> Tensor:
        """Return the step at ``bits``, differentiable, in a shape that broadcasts against the weight."""
        scale = F.quantization_grid(*F.value_range(weight, self.axis), bits, symmetric=True)[0]
        return scale if self.axis is None else scale.reshape(-1, *[1] * (weight.dim() - 1))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this quantizer."""
        return f"bits={self.bits}, per_channel={self.axis is not None}"


class ActivationQuantizer(nn.Module):
    """Fake-quantizes an activation to ``bits``, and measures the l1 norm of its gradient.

    The range is per tensor and includes zero; :func:`gradl1_fast.calibrate` sets it. At float
    width the module is a tap: its output is its input, and nothing is computed.

    Args:
        penalized: whether a penalty counts this tensor. The input of a network is data, not one of
            its activations, and is not counted.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
        low: lower end of the range, a scalar, or None before calibration; see :meth:`set_range`.
        high: upper end of the range.
        probe: the scalar leaf whose gradient is ``sum |dL/dy|`` once it requires one, which a penalty
            on activations asks for; None where not penalized.
        step_bits: when set, the probe's gradient is multiplied by the step at this width.
        observer: watches what arrives, during calibration only.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(self, *, penalized: bool = True) -> None:
        super().__init__()
        self.bits: int | None = None
        self.step_bits: int | None = None
        self.observer: Observer | None = None
        self.register_buffer("low", None, persistent=False)
        self.register_buffer("high", None, persistent=False)
        self.probe = _new_probe(torch.zeros(())) if penalized else None

    @property
    def is_plain_tap(self) -> bool:
        """Whether this quantizer does no more than to pass its input on and to fill its probe."""
        return self.bits is None and self.step_bits is None and self.observer is None

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation as it is seen at the present width."""
        if self.observer is not None:
            self.observer.update(x.detach())
        probe = self._scaled_probe(x)
        if self.bits is None:
            return x if probe is None else F.tap(x, probe)
        scale, zero_point, q_min, q_max = F.quantization_grid(*self._range(x), self.bits, symmetric=False)
        return F.fake_quantize(x, scale, zero_point, q_min, q_max, probe=probe)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Store the range of the activation; it takes a look at the values, which waits for the device.

        Raises:
            ValueError: an end is no single number, is NaN or infinite, or the ends are inverted.
        """
        if low.numel() != 1 or high.numel() != 1:
            raise ValueError(f"a range has two single ends, got {tuple(low.shape)} and {tuple(high.shape)}")
        ends = float(low), float(high)
        if not all(map(math.isfinite, ends)):
            raise ValueError(f"from {ends[0]} to {ends[1]}: NaN and infinity make no range")
        if ends[0] > ends[1]:
            raise ValueError(f"from {ends[0]} to {ends[1]}: the range is inverted")
        self.low, self.high = low.detach().reshape(()), high.detach().reshape(())

    def step(self, x: Tensor, bits: int) -> Tensor:
        """Return the step at ``bits`` for the present range of ``x``, a differentiable scalar."""
        return F.quantization_grid(*F.value_range(x), bits, symmetric=False)[0]

    def _scaled_probe(self, x: Tensor) -> Tensor | None:
        measured = self.probe is not None and self.probe.requires_grad and torch.is_grad_enabled()
        if self.probe is None or self.step_bits is None or not measured:
            return self.probe
        return F.scale_probe(self.probe, self.step(x, self.step_bits))

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.low is None or self.high is None:
            raise RuntimeError("an activation quantizer has no range: call gradl1_fast.calibrate first")
        wide = sum_dtype(x.dtype)
        return self.low.to(wide), self.high.to(wide)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.probe is not None:
            self.probe = _new_probe(fn(self.probe.detach())).requires_grad_(self.probe.requires_grad)
        return self

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this quantizer."""
        known = self.low is not None and self.high is not None
        ends = f"[{float(self.low):.4g}, {float(self.high):.4g}]" if known else None  # type: ignore[arg-type]
        return f"bits={self.bits}, range={ends}, penalized={self.probe is not None}"


def _new_probe(like: Tensor) -> Tensor:
    """Return a fresh leaf on the device of ``like``, in float32 at least: it receives a sum."""
    return torch.zeros((), dtype=sum_dtype(like.dtype), device=like.device)
