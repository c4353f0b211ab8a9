"""The autograd side of a region: one node for its forward pass, and one for its first backward pass.

The forward pass returns, beside its outputs, a scalar that nobody sees, the *token*. The first backward pass
takes it: that edge makes autograd run every double backward pass of a region before its last backward pass.
What a double backward pass puts by carries the number of the graph task it ran in, and the last backward
pass of the same task takes it up. So it does not matter how gradients are asked for: of loss and penalty
together or one after the other, in either order, for all parameters or for some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.conversion.regions.passes import PutBy, Saved, task
from gradl1_fast.conversion.regions.program import Program
from gradl1_fast.nn.arming import Arming

__all__ = ["run"]


def run(
    program: Program,
    arming: Arming,
    inputs: Sequence[Tensor],
    args: Sequence[Tensor],
    probes: Sequence[Tensor],
) -> list[Tensor]:
    """Return the outputs of a region, with one node of the graph for all of it."""
    if not torch.is_grad_enabled():
        return program.forward(inputs, list(args), None)
    return list(_Region.apply(program, arming, *inputs, *args, *probes)[:-1])


class _Region(torch.autograd.Function):
    """The forward pass; its backward is the first of double backprop, or the last."""

    @staticmethod
    def forward(ctx: Any, program: Program, arming: Arming, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(program.wanted)
        ctx.program, ctx.arming, ctx.saved = program, arming, Saved(len(program.operations))
        ctx.measured_at = program.step_bits  # for a penalty, which may have another scale
        inputs, args = tensors[: program.inputs], list(tensors[program.inputs : count])
        # What is kept knows nothing of the graph: an output that did would keep its own node alive.
        outputs = [value.detach() for value in program.forward(inputs, args, ctx.saved)]
        token = inputs[0].new_zeros(())
        kept = [outputs[i] for i in program.kept]  # whoever changes them in place is told
        needed = [t if program.is_needed[i] else None for i, t in enumerate(tensors[:count])]
        ctx.save_for_backward(*needed, *kept, token)
        ctx.set_materialize_grads(False)
        return *outputs, token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, token = ctx.saved_tensors  # raises if the graph was freed, or a tensor was changed
        program, dys = ctx.program, grads[:-1]
        tensors = tensors[: len(program.wanted)]
        put_by = _taken_up(ctx.saved)
        if torch.is_grad_enabled() and put_by is None:
            values = _RegionBackward.apply(program, ctx.saved, ctx.arming.asked, *dys, *tensors, token)
            return None, None, *values
        with torch.no_grad():
            of_inputs, of_args = program.last_backward(ctx.saved, tensors[program.inputs :], dys, put_by)
        found = _wanted(program, [*of_inputs, *of_args])
        if torch.is_grad_enabled():
            found = _end_the_line(found, tensors)
        return None, None, *found, *[None] * len(program.measured)


class _RegionBackward(torch.autograd.Function):
    """The first backward pass; its backward is the double backward pass."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, saved: Saved, asked: str, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs = len(program.outputs)
        dys, values = tensors[:outputs], tensors[outputs:-1]
        args: Any = list(values[program.inputs :])
        (of_inputs, of_args), terms, record = program.first_backward(saved, args, dys, asked)
        ctx.program, ctx.saved, ctx.record = program, saved, record
        ctx.save_for_backward(*dys, *values)
        ctx.set_materialize_grads(False)
        return *_wanted(program, [*of_inputs, *of_args]), *terms

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program: Program = ctx.program
        tensors = ctx.saved_tensors[len(program.outputs) :]
        inputs, count = program.inputs, len(program.wanted)
        with torch.no_grad():
            d_dys, (of_inputs, of_args), put_by = program.double_backward(
                ctx.saved,
                ctx.record,
                list(tensors[inputs:]),
                (cotangents[:inputs], cotangents[inputs:count], cotangents[count:]),
            )
        ctx.saved.put_by.append((task(), put_by))
        d_dys = [d if dy is not None else None for d, dy in zip(d_dys, ctx.saved_tensors, strict=False)]
        grads = [*d_dys, *_wanted(program, [*of_inputs, *of_args])]
        if torch.is_grad_enabled():
            grads = _end_the_line(grads, tensors)
        return None, None, None, *grads, None


class _EndOfLine(torch.autograd.Function):
    """Gradients of second order, which cannot be differentiated again and say so."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("gradl1_fast: first and second order gradients only")


def _end_the_line(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    present = [grad for grad in grads if grad is not None]
    known = [tensor for tensor in tensors if tensor is not None]
    ended = iter(_EndOfLine.apply(len(present), *present, *known)) if present else iter(())
    return [None if grad is None else next(ended) for grad in grads]


def _wanted(program: Program, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [grad if wanted else None for grad, wanted in zip(grads, program.wanted, strict=True)]


def _taken_up(saved: Saved) -> PutBy | None:
    """Return what double backward passes of the present graph task have put by; drop what others have."""
    present, taken = task(), None
    for number, put_by in saved.put_by:
        if number == present:
            if taken is None:
                taken = put_by
            else:
                taken.add(put_by)
    saved.put_by = []
    return taken
