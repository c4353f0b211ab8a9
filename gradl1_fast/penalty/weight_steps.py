"""The quantization steps of many weights, computed together as a differentiable vector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradl1_fast._checks import is_traced_by_make_fx
from gradl1_fast.backends import contract, resolve
from gradl1_fast.penalty.checks.distributed import is_distributed
from gradl1_fast.penalty.measured import WeightTerm

__all__ = ["can_be_together", "weight_steps"]


def can_be_together(terms: Sequence[WeightTerm]) -> bool:
    """Return whether :func:`weight_steps` supports the weights: each has one range for the tensor."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if is_traced_by_make_fx():
        return False
    first = terms[0].tensor
    return all(
        term.layer.weight_quantizer.axis is None
        and type(term.tensor) in (Tensor, torch.nn.Parameter)
        and (term.tensor.dtype, term.tensor.device) == (first.dtype, first.device)
        for term in terms
    )


def weight_steps(weights: Sequence[Tensor], bits: int) -> Tensor:
    """Return the step at ``bits`` for the range of each weight, in the type of sums.

    The gradient goes to the largest magnitude and is shared evenly among equal values, as in
    :meth:`gradl1_fast.nn.quantizers.WeightQuantizer.step`. Differentiable once.
    """
    steps: Tensor = _Steps.apply(bits, *weights)
    node: Any = steps.grad_fn
    if node is not None and not is_distributed():
        # Let autograd visit this node last: its dense gradients then meet no activations in memory. On
        # several ranks they would hold up the communication of all gradients.
        node._set_sequence_nr(0)
    return steps


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: int, *weights: Tensor) -> Tensor:
        taps = [_tap_of(weight) for weight in weights]
        ends = torch.stack([tap.ends(weight) for tap, weight in zip(taps, weights, strict=True)])
        ctx.taps, ctx.bits = taps, bits
        ctx.save_for_backward(ends, *weights)
        return _unclamped(ends, bits).clamp(min=torch.finfo(ends.dtype).tiny)

    @staticmethod
    def backward(ctx: Any, d_steps: Tensor) -> tuple[Tensor | None, ...]:
        ends, *weights = ctx.saved_tensors
        return None, *_StepsBackward.apply(d_steps, ctx.taps, ctx.bits, ends, *weights)


class _StepsBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, d_steps: Tensor, taps: list[contract.Tap], bits: int, ends: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        rows = zip(taps, weights, ends, _d_ends(d_steps, ends, bits).unbind(), strict=True)
        return tuple(tap.add_ends_gradient(None, weight, row, d) for tap, weight, row, d in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("gradl1_fast: first and second order gradients only, also of the step of a weight")


def _tap_of(weight: Tensor) -> contract.Tap:
    backend = resolve("tap", weight)
    return _tap_like(backend, weight.shape, weight.stride(), weight.dtype, weight.device)


@functools.lru_cache(maxsize=512)
def _tap_like(
    backend: ModuleType, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> contract.Tap:
    """Return a prepared tap; weights keep their shape from step to step."""
    return contract.prepare_tap(backend, torch.empty_strided(shape, stride, dtype=dtype, device=device))


def _unclamped(ends: Tensor, bits: int) -> Tensor:
    return torch.maximum(-ends[:, 0], ends[:, 1]) / _codes(bits)  # 0 or more, since low <= high


def _d_ends(d_steps: Tensor, ends: Tensor, bits: int) -> Tensor:
    """Return the gradients of both ends, one row per weight."""
    passed = _unclamped(ends, bits) >= torch.finfo(ends.dtype).tiny
    d = torch.where(passed, d_steps / _codes(bits), 0)
    # The end of larger magnitude gets the gradient; equal ones get half of it each.
    d_high = d * torch.heaviside(ends[:, 0] + ends[:, 1], torch.full_like(d, 0.5))
    return torch.stack([d_high - d, d_high], 1)


def _codes(bits: int) -> int:
    return max(2 ** (bits - 1) - 1, 1)
