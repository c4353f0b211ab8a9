"""The operations of a region in order, and the four passes over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradl1_fast.backends import contract, resolve
from gradl1_fast.conversion.regions.measuring import Measurement
from gradl1_fast.conversion.regions.operations import Operation
from gradl1_fast.conversion.regions.passes import (
    Backward,
    Deferred,
    DoubleBackward,
    Forward,
    NotFittingError,
    Record,
    Saved,
    keeps_graph,
)
from gradl1_fast.conversion.regions.statistics import update_statistics

__all__ = ["Program"]

Gradients = tuple[list[Tensor | None], list[Tensor | None]]


class Program:
    """The computation of a region for fixed shapes, types and modes.

    Args:
        operations: the operations, in order.
        active: the operations whose result requires a gradient.
        slots: the number of tensors; the first are the inputs.
        inputs: the number of inputs.
        outputs: the slots of the outputs.
        measured: how each measured site measures its tensor.
        requires_grad: whether each input, then each parameter, requires a gradient.

    Attributes:
        saved_outputs: the indices of the outputs that later passes read.
        is_needed: whether later passes read each input, then each parameter.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        active: Sequence[Operation],
        slots: int,
        inputs: int,
        outputs: Sequence[int],
        measured: Sequence[Measurement],
        requires_grad: Sequence[bool],
    ) -> None:
        self.operations, self.slots, self.inputs, self.outputs = operations, slots, inputs, outputs
        self.measured, self.requires_grad = measured, requires_grad
        self._active, self._reversed = active, active[::-1]
        self._last_read = _last_read(active, keep=outputs)
        self._taps: dict[tuple[int, ...], contract.Taps] = {}
        self.step_bits = _step_bits(measured)
        needed = {slot for operation in operations for slot in operation.keeps()}
        self.is_needed = [slot in needed for slot in range(inputs)] + [True] * (len(requires_grad) - inputs)
        self.saved_outputs = [i for i, slot in enumerate(outputs) if slot in needed]

    def forward(self, inputs: Sequence[Tensor], args: list[Tensor], saved: Saved | None) -> list[Tensor]:
        """Return the outputs, and save what later passes read."""
        run = Forward(self.slots, args, None if saved is None else saved.by_operation)
        run.values[: self.inputs] = inputs
        for operation in self.operations:
            operation.forward(run)
        update_statistics(run.statistics)
        if saved is not None and self.step_bits is not None:
            saved.ends_of_slots = run.ends
            saved.ends = torch.stack([run.ends[measurement.slot] for measurement in self.measured])
            saved.steps, saved.unlimited = _measured(saved.ends, self.step_bits)
        return [run.values[slot] for slot in self.outputs]

    def first_backward(
        self, saved: Saved, args: list[Tensor], dys: Sequence[Tensor | None], requested: str
    ) -> tuple[Gradients, list[Tensor | None], Record]:
        """Return the gradients of inputs and parameters, the term of each measured site, and the record."""
        run, record = Backward(saved.by_operation, args, [None] * self.slots), Record(len(self.operations))
        run.record = record.by_operation
        run.of_weights, run.of_others = requested != "activations", requested == "all"
        self._add_output_gradients(run, dys)
        self._backward(run)
        terms = self._terms(run.l1, saved, record)
        return (run.grads[: self.inputs], run.of_args), terms, record

    def last_backward(
        self, saved: Saved, args: list[Tensor], dys: Sequence[Tensor | None], deferred: Deferred | None
    ) -> Gradients:
        """Return the gradients of inputs and parameters."""
        run = Backward(
            saved.by_operation, args, [None] * self.slots if deferred is None else deferred.of_slots
        )
        if deferred is not None and deferred.of_ends:
            run.d_ends, run.ends = deferred.of_ends, saved.ends_of_slots
        self._add_output_gradients(run, dys)
        self._backward(run, free=not keeps_graph())
        if deferred is not None:
            self._add_ends_gradients(run, deferred)
        return run.grads[: self.inputs], run.of_args

    def double_backward(
        self,
        saved: Saved,
        record: Record,
        args: list[Tensor],
        cotangents: tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]],
    ) -> tuple[list[Tensor | None], Gradients, Deferred]:
        """Return the cotangents of the output gradients, of inputs and of parameters, and the deferred ones.

        Args:
            saved: what the forward pass saved.
            record: what the first backward pass saved.
            args: the parameters.
            cotangents: the cotangents of the gradients of inputs, of those of parameters, and of the terms.
        """
        d_inputs, d_args, d_terms = cotangents
        run = DoubleBackward(saved.by_operation, args, [*d_inputs, *[None] * (self.slots - self.inputs)])
        run.d_args = list(d_args)
        self._set_cotangents(run, d_terms, saved, record)
        free = not keeps_graph()
        for operation, last in zip(self._active, self._last_read, strict=True):
            operation.double_backward(run, record.by_operation[operation.index])
            if free:
                record.by_operation[operation.index] = None
            for slot in last:
                run.tangents[slot] = None
        of_inputs, run.deferred.of_slots[: self.inputs] = (
            run.deferred.of_slots[: self.inputs],
            [None] * self.inputs,
        )
        return [run.tangents[slot] for slot in self.outputs], (of_inputs, run.of_args), run.deferred

    def taps(self, indices: Sequence[int], args: Sequence[Tensor]) -> contract.Taps:
        """Return the taps of some parameters, prepared once."""
        key = tuple(indices)
        if key not in self._taps:
            weights = [args[index] for index in indices]
            self._taps[key] = contract.prepare_taps(resolve("tap", weights[0]), weights)
        return self._taps[key]

    def _add_ends_gradients(self, run: Backward, deferred: Deferred) -> None:
        """Add the gradients of the ends of weights to those of the weights."""
        for indices, ends, d_ends in deferred.of_weights:
            weights, grads = [run.args[i] for i in indices], [run.of_args[i] for i in indices]
            totals = self.taps(indices, run.args).add_ends_gradients(grads, weights, ends, d_ends)
            for index, total in zip(indices, totals, strict=True):
                run.of_args[index] = total

    def _add_output_gradients(self, run: Backward, dys: Sequence[Tensor | None]) -> None:
        for slot, dy in zip(self.outputs, dys, strict=True):
            if dy is not None:
                run.add(slot, dy, owned=False)

    def _backward(self, run: Backward, *, free: bool = False) -> None:
        for operation in self._reversed:
            dy, run.grads[operation.out] = run.grads[operation.out], None
            if dy is None and operation.ends_slot in run.d_ends:
                dy = torch.zeros_like(operation.value(run))
            if dy is not None:
                operation.backward(run, dy)
            if free:
                run.saved[operation.index] = None

    def _terms(self, l1: dict[int, Tensor], saved: Saved, record: Record) -> list[Tensor | None]:
        """Return the term of each measured site: its norm, multiplied by the step with ``scale="step"``."""
        norms = [l1.get(number) for number in range(len(self.measured))]
        template = next((norm for norm in norms if norm is not None), None)
        if saved.steps is None or template is None:
            return norms
        record.l1 = torch.stack(_without_none(norms, template))
        terms = (record.l1 * saved.steps).unbind()
        return [None if norm is None else term for norm, term in zip(norms, terms, strict=True)]

    def _set_cotangents(
        self, run: DoubleBackward, d_terms: Sequence[Tensor | None], saved: Saved, record: Record
    ) -> None:
        """Set the cotangent of each norm, and defer those of the ends of the tensors."""
        if saved.steps is None:
            run.d_l1 = {number: d for number, d in enumerate(d_terms) if d is not None}
            return
        if record.l1 is None or all(d is None for d in d_terms):
            return
        d = torch.stack(_without_none(d_terms, record.l1))
        run.d_l1 = dict(enumerate((d * saved.steps).unbind()))
        d_ends = _d_ends(d * record.l1, saved.ends, saved.unlimited, self.step_bits)  # type: ignore[arg-type]
        run.deferred.of_ends = {
            measurement.slot: row for measurement, row in zip(self.measured, d_ends.unbind(), strict=True)
        }


def _without_none(values: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Return the scalars with 0 in place of None, in the type of ``like``."""
    return [like.new_zeros(()) if value is None else value for value in values]


def _last_read(operations: Sequence[Operation], keep: Sequence[int]) -> list[list[int]]:
    """Return, for each operation, the slots that no later one reads, without those to keep."""
    seen, last = set(keep), []
    for operation in reversed(operations):
        last.append([slot for slot in operation.reads() if slot not in seen])
        seen.update(operation.reads())
    return last[::-1]


def _step_bits(measured: Sequence[Measurement]) -> int | None:
    """Return the bit width that determines the steps; None without ``scale="step"``.

    Raises:
        NotFittingError: the sites are measured for penalties with different scales.
    """
    widths = {measurement.quantizer.step_bits for measurement in measured}
    if len(widths) > 1:
        raise NotFittingError("the sites are measured for penalties with different scales")
    return next(iter(widths), None)


def _measured(ends: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the step for each row of ends, and what it would be without a lower limit.

    Computed as in ``functional.quantization_grid``.
    """
    unlimited = ((ends[:, :2] * contract.signs_of_ends(ends)).clamp_(min=0) / (2**bits - 1)).sum(1)
    return unlimited.clamp(min=torch.finfo(ends.dtype).tiny), unlimited


def _d_ends(d_steps: Tensor, ends: Tensor, unlimited: Tensor, bits: int) -> Tensor:
    """Return the gradients of the ends, ``(sites, 2)``."""
    d = torch.where(unlimited >= torch.finfo(ends.dtype).tiny, d_steps, 0) / (2**bits - 1)
    signs = contract.signs_of_ends(ends)
    return torch.where(ends[:, :2] * signs >= 0, d.unsqueeze(1) * signs, 0)
