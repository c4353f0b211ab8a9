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


def weight_steps(weights: Sequence[Tensor], grads: Sequence[Tensor], bits: int) -> Tensor:
    """Return the step at ``bits`` for the range of each weight, in the type of sums.

    The gradient goes to the end of larger magnitude, half of it to each if both are equal, shared evenly
    among the values equal to it, as in :meth:`gradl1_fast.nn.quantizers.WeightQuantizer.step`.
    Differentiable once.

    Args:
        weights: the weights.
        grads: the gradient of each. A region that computed some adds the gradients of their steps to those of
            the weights in its last backward pass; autograd adds the others, as dense tensors.
        bits: the bit width.
    """
    groups = _by_region(weights, grads)
    if len(groups) == 1:
        ((region, members),) = groups.items()
        return _steps(weights, grads, bits, region, members)
    steps: list[Any] = [None] * len(weights)
    for region, members in groups.items():
        of_group = _steps(weights, grads, bits, region, members).unbind()
        for (number, _), step in zip(members, of_group, strict=True):
            steps[number] = step
    return torch.stack(steps)


_Members = list[tuple[int, int]]  # the numbers of weights, and their indices in a region


def _by_region(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[Any, _Members]:
    """Return the weights of each region, by what its first backward pass carries; None without a region."""
    groups: dict[Any, _Members] = {}
    for number, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        region = getattr(grad.grad_fn, "weights_of_region", None)
        index = None if region is None else region.index(weight, grad.output_nr)
        groups.setdefault(None if index is None else region, []).append((number, index or 0))
    return groups


def _steps(
    weights: Sequence[Tensor], grads: Sequence[Tensor], bits: int, region: Any, members: _Members
) -> Tensor:
    """Return the steps of the weights of one region, or of those outside of regions."""
    if region is not None:
        steps: Tensor = _RegionSteps.apply(bits, region, [i for _, i in members], grads[members[0][0]])
        return steps
    steps = _Steps.apply(bits, *[weights[number] for number, _ in members])
    node: Any = steps.grad_fn
    if node is not None and not is_distributed():
        # Let autograd visit this node last: its dense gradients then meet no activations in memory. On
        # several ranks they would hold up the communication of all gradients.
        node._set_sequence_nr(0)
    return steps


class _RegionSteps(torch.autograd.Function):
    """The steps of weights of a region, which adds their gradients itself."""

    @staticmethod
    def forward(ctx: Any, bits: int, region: Any, indices: list[int], grad: Tensor) -> Tensor:
        # `grad` gives this node an edge to the first backward pass of the region. The last one then runs
        # after this node's backward, and for each tensor that the gradients of the steps can reach.
        ends = region.ends(indices)
        steps, unlimited = _measured(ends, bits)
        ctx.bits, ctx.region, ctx.indices = bits, region, indices
        ctx.save_for_backward(ends, unlimited)
        return steps

    @staticmethod
    def backward(ctx: Any, d_steps: Tensor) -> tuple[None, ...]:
        ends, unlimited = ctx.saved_tensors
        with torch.no_grad():  # the last backward pass refuses a third derivative
            ctx.region.defer(ctx.indices, ends, _d_ends(d_steps, ends, unlimited, ctx.bits))
        return None, None, None, None


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: int, *weights: Tensor) -> Tensor:
        ctx.bits, ctx.taps = bits, contract.Taps([_tap_of(weight) for weight in weights])
        ends = ctx.taps.ends(weights)
        steps, unlimited = _measured(ends, bits)
        ctx.save_for_backward(ends, unlimited, *weights)
        return steps

    @staticmethod
    def backward(ctx: Any, d_steps: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_StepsBackward.apply(d_steps, ctx.taps, ctx.bits, *ctx.saved_tensors)


class _StepsBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        d_steps: Tensor,
        taps: contract.Taps,
        bits: int,
        ends: Tensor,
        unlimited: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        none, d_ends = [None] * len(weights), _d_ends(d_steps, ends, unlimited, bits)
        return tuple(taps.add_ends_gradients(none, weights, ends, d_ends))

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


def _measured(ends: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the steps, and what they would be without a lower limit."""
    unlimited = ends[:, :2].abs().amax(1) / _codes(bits)
    return unlimited.clamp(min=torch.finfo(ends.dtype).tiny), unlimited


def _d_ends(d_steps: Tensor, ends: Tensor, unlimited: Tensor, bits: int) -> Tensor:
    """Return the gradients of both ends, one row per weight."""
    d = torch.where(unlimited >= torch.finfo(ends.dtype).tiny, d_steps, 0) / (2 * _codes(bits))
    # The end of larger magnitude gets the gradient; equal ones get half of it each.
    longer = ends[:, :2].sum(1, keepdim=True).sign()  # 1 if the high end is the longer one, -1 if the low one
    return (longer + contract.signs_of_ends(ends)) * d.unsqueeze(1)


def _codes(bits: int) -> int:
    return max(2 ** (bits - 1) - 1, 1)
