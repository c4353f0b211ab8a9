"""The autograd nodes of a region: one for its forward pass and one for its first backward pass.

Besides its outputs, the forward pass returns an internal scalar, the *token*. The first backward pass takes
the token as an input. That edge makes autograd run every double backward pass of a region before its last
backward pass. A double backward pass defers cotangents to the last backward pass and stores them with the
number of its graph task; the last backward pass of the same task adds them. The gradients of loss and
penalty can therefore be requested together or separately, in either order, for all or some parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.conversion.regions.passes import Saved
from gradl1_fast.conversion.regions.program import Program
from gradl1_fast.conversion.regions.weights import WeightsOfRegion
from gradl1_fast.nn.arming import Arming

__all__ = ["run"]


def run(
    program: Program,
    arming: Arming,
    inputs: Sequence[Tensor],
    args: Sequence[Tensor],
    probes: Sequence[Tensor],
) -> list[Tensor]:
    """Return the outputs of a region, computed by a single node of the autograd graph."""
    if not torch.is_grad_enabled():
        return program.forward(inputs, list(args), None)
    return list(_Region.apply(program, arming, *inputs, *args, *probes)[:-1])


class _Region(torch.autograd.Function):
    """The forward pass; its backward is the first or the last backward pass of double backprop."""

    @staticmethod
    def forward(ctx: Any, program: Program, arming: Arming, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(program.requires_grad)
        ctx.program, ctx.arming, ctx.saved = program, arming, Saved(len(program.operations))
        ctx.measured_at = program.step_bits  # compared by penalties: theirs may differ
        inputs, args = tensors[: program.inputs], list(tensors[program.inputs : count])
        # The saved outputs are detached: otherwise they would keep their own node alive.
        outputs = [value.detach() for value in program.forward(inputs, args, ctx.saved)]
        token = inputs[0].new_zeros(())
        # Saved so that autograd detects in-place changes.
        saved_outputs = [outputs[i] for i in program.saved_outputs]
        needed = [t if program.is_needed[i] else None for i, t in enumerate(tensors[:count])]
        ctx.save_for_backward(*needed, *saved_outputs, token)
        ctx.set_materialize_grads(False)
        return *outputs, token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, token = ctx.saved_tensors  # raises if the graph was freed, or a tensor was changed
        program, dys = ctx.program, grads[:-1]
        tensors = tensors[: len(program.requires_grad)]
        deferred = ctx.saved.take_deferred()
        if torch.is_grad_enabled() and deferred is None:
            values = _RegionBackward.apply(program, ctx.saved, ctx.arming.requested, *dys, *tensors, token)
            return None, None, *values
        with torch.no_grad():
            of_inputs, of_args = program.last_backward(ctx.saved, tensors[program.inputs :], dys, deferred)
        result = _required(program, [*of_inputs, *of_args])
        if torch.is_grad_enabled():
            result = _refuse_third_order(result, tensors)
        return None, None, *result, *[None] * len(program.measured)


class _RegionBackward(torch.autograd.Function):
    """The first backward pass; its backward is the double backward pass."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, saved: Saved, requested: str, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs = len(program.outputs)
        dys, values = tensors[:outputs], tensors[outputs:-1]
        args: Any = list(values[program.inputs :])
        (of_inputs, of_args), terms, record = program.first_backward(saved, args, dys, requested)
        ctx.program, ctx.saved, ctx.record = program, saved, record
        ctx.weights_of_region = WeightsOfRegion(program, saved, args)
        ctx.save_for_backward(*dys, *values)
        ctx.set_materialize_grads(False)
        return *_required(program, [*of_inputs, *of_args]), *terms

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program: Program = ctx.program
        tensors = ctx.saved_tensors[len(program.outputs) :]
        inputs, count = program.inputs, len(program.requires_grad)
        with torch.no_grad():
            d_dys, (of_inputs, of_args), deferred = program.double_backward(
                ctx.saved,
                ctx.record,
                list(tensors[inputs:]),
                (cotangents[:inputs], cotangents[inputs:count], cotangents[count:]),
            )
        ctx.saved.defer(deferred)
        d_dys = [d if dy is not None else None for d, dy in zip(d_dys, ctx.saved_tensors, strict=False)]
        grads = [*d_dys, *_required(program, [*of_inputs, *of_args])]
        if torch.is_grad_enabled():
            grads = _refuse_third_order(grads, tensors)
        return None, None, None, *grads, None


class _SecondOrderGradients(torch.autograd.Function):
    """Identity on second-order gradients; its backward raises, since third order is not supported."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("gradl1_fast: first and second order gradients only")


def _refuse_third_order(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    present = [grad for grad in grads if grad is not None]
    known_tensors = [tensor for tensor in tensors if tensor is not None]
    checked = (
        iter(_SecondOrderGradients.apply(len(present), *present, *known_tensors)) if present else iter(())
    )
    return [None if grad is None else next(checked) for grad in grads]


def _required(program: Program, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [grad if required else None for grad, required in zip(grads, program.requires_grad, strict=True)]
