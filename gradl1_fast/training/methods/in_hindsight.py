"""In-hindsight ranges: quantizes each batch in the ranges of the previous batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import MovingRange, Quantizing, ends_of

__all__ = ["HindsightRange", "InHindsight", "quantize_stochastically"]


def quantize_stochastically(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return x on the affine grid from low to high, with stochastic rounding, which is unbiased.

    Args:
        x: of any shape; values beyond the range are clamped.
        low: scalar; the grid includes zero.
        high: scalar.
        bits: the width.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / scale)
    codes = torch.floor(x / scale + torch.rand_like(x)) + zero
    return scale * (codes.clamp(0, 2**bits - 1) - zero)


class HindsightRange(MovingRange):
    """A range estimate from earlier batches, which each batch updates after it was quantized.

    ``low_t = momentum low_(t-1) + (1 - momentum) min(x_(t-1))``, and the same for the maximum. The first
    batch has its own range.

    Args:
        quantizer: the quantizer whose range is set; None for a range that is used elsewhere.
        momentum: weight of the old estimate.
    """

    quantizer: ActivationQuantizer

    def __init__(self, quantizer: ActivationQuantizer | None, momentum: float) -> None:
        self.quantizer = quantizer  # type: ignore[assignment]
        self.momentum = momentum
        self.low = self.high = None

    def next(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends for quantizing a batch, scalars, and update the estimate."""
        low, high = x.detach().aminmax()
        before = (low, high) if self.low is None or self.high is None else (self.low, self.high)
        self.low, self.high = (
            torch.lerp(new, old, self.momentum) for new, old in zip((low, high), before, strict=True)
        )
        return before

    def update(self, x: Tensor) -> None:
        """Set the range of the quantizer for a batch; see :meth:`next`."""
        wide = x if x.dtype == torch.float64 else x.float()
        self.quantizer.low, self.quantizer.high = self.next(wide)


class _QuantizedGradient(torch.autograd.Function):
    """The identity with a quantized gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimate: HindsightRange, bits: int) -> Tensor:
        ctx.estimate, ctx.bits = estimate, bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        low, high = ctx.estimate.next(grad)
        return quantize_stochastically(grad, low, high, ctx.bits), None, None


class InHindsight(Quantizing):
    """Training with quantized weights, activations and gradients, in ranges estimated on earlier batches.

    Weights use their current range, and activations and gradients ranges in hindsight, so each tensor is read
    once. The gradient of each layer's output is quantized with stochastic rounding before both products of
    the backward pass. Master weights and batch norms stay in float. Reconstruction: the update rule is from
    memory.

    Args:
        model: a converted model.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float.
        g: bits of the gradients, None for float.
        momentum: weight of the old estimate, 0 to less than 1; 0 uses the previous batch.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Fournarakis and Nagel 2021, arXiv 2105.04246.
    """

    name = "hindsight"
    text = "weights, activations and gradients quantized, ranges in hindsight"
    source = "Fournarakis and Nagel 2021, arXiv 2105.04246"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = (
        Variant(
            "hindsight-8",
            "in-hindsight ranges, weights, activations and gradients at 8 bits",
            {"w": 8, "a": 8, "g": 8},
        ),
    )

    ranges: dict[str, HindsightRange]  # type: ignore[assignment]

    def __init__(
        self, model: nn.Module, *, w: int | None, a: int | None, g: int | None, momentum: float = 0.9
    ) -> None:
        if g is not None:
            check.bits(g, "InHindsight: g (None for float)")
        if not 0 <= momentum < 1:
            raise ValueError(f"InHindsight: momentum must be from 0 to less than 1, got {momentum}")
        self.momentum, self.gradient_bits = momentum, g
        super().__init__(model, [(w, a)])
        self.gradients = {name: HindsightRange(None, momentum) for name in self.layers}

    def range_for(self, name: str, quantizer: ActivationQuantizer) -> HindsightRange:
        """See :meth:`Quantizing.range_for`."""
        return HindsightRange(quantizer, self.momentum)

    @contextlib.contextmanager
    def during_step(self) -> Iterator[None]:
        """Quantize weights and activations, and the gradients of the layers' outputs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().during_step())
            for name, layer in self.layers.items() if self.gradient_bits else ():
                hook = partial(self._quantize_gradient, self.gradients[name])
                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    def _quantize_gradient(
        self, estimate: HindsightRange, layer: nn.Module, args: Any, output: Tensor
    ) -> Tensor:
        return _QuantizedGradient.apply(output, estimate, self.gradient_bits)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ranges of activations and gradients so far."""
        ends = ends_of({f"gradient.{name}": estimate for name, estimate in self.gradients.items()})
        return {**super().state_dict(), **ends}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        for name, estimate in self.gradients.items():
            estimate.low = state.get(f"gradient.{name}.low")
            estimate.high = state.get(f"gradient.{name}.high")
