"""A region's operations in order, and its four passes over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradl1_fast.conversion.regions.measuring import Measured
from gradl1_fast.conversion.regions.operations import Operation
from gradl1_fast.conversion.regions.passes import (
    Backward,
    DoubleBackward,
    Forward,
    NotFittingError,
    PutBy,
    Record,
    Saved,
    keeps_graph,
)
from gradl1_fast.conversion.regions.statistics import update_statistics

__all__ = ["Program"]

Gradients = tuple[list[Tensor | None], list[Tensor | None]]


class Program:
    """What a region computes for tensors of certain shapes, types and modes.

    Args:
        operations: in order.
        active: those whose result depends on something that needs a gradient.
        slots: number of tensors, of which the first are the inputs.
        inputs: number of inputs.
        outputs: slots of the outputs.
        measured: what sites measure, by the number of the site.
        wanted: for each input and then each parameter, whether it needs a gradient.

    Attributes:
        kept: the outputs that later passes need, by their number.
        is_needed: for each input and then each parameter, whether later passes need it.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        active: Sequence[Operation],
        slots: int,
        inputs: int,
        outputs: Sequence[int],
        measured: Sequence[Measured],
        wanted: Sequence[bool],
    ) -> None:
        self.operations, self.slots, self.inputs, self.outputs = operations, slots, inputs, outputs
        self.measured, self.wanted = measured, wanted
        self._active, self._reversed = active, active[::-1]
        self.step_bits = _step_bits(measured)
        needed = {slot for operation in operations for slot in operation.keeps()}
        self.is_needed = [slot in needed for slot in range(inputs)] + [True] * (len(wanted) - inputs)
        self.kept = [i for i, slot in enumerate(outputs) if slot in needed]

    def forward(self, inputs: Sequence[Tensor], args: list[Tensor], saved: Saved | None) -> list[Tensor]:
        """Return the outputs; keep what later passes need."""
        run = Forward(self.slots, args, None if saved is None else saved.by_operation)
        run.values[: self.inputs] = inputs
        for operation in self.operations:
            operation.forward(run)
        update_statistics(run.statistics)
        if saved is not None and self.step_bits is not None:
            saved.ends = torch.stack([run.ends[what.slot] for what in self.measured])
            saved.steps = _steps(saved.ends, self.step_bits)
        return [run.values[slot] for slot in self.outputs]

    def first_backward(
        self, saved: Saved, args: list[Tensor], dys: Sequence[Tensor | None], asked: str
    ) -> tuple[Gradients, list[Tensor | None], Record]:
        """Return the gradients of inputs and parameters, the term of each measured site, and a record."""
        run, record = Backward(saved.by_operation, args, [None] * self.slots), Record(len(self.operations))
        run.record = record.by_operation
        run.of_weights, run.of_others = asked != "activations", asked == "all"
        self._arrive(run, dys)
        self._sweep(run)
        terms = self._terms(run.l1, saved, record)
        return (run.grads[: self.inputs], run.of_args), terms, record

    def last_backward(
        self, saved: Saved, args: list[Tensor], dys: Sequence[Tensor | None], put_by: PutBy | None
    ) -> Gradients:
        """Return the gradients of inputs and parameters."""
        run = Backward(saved.by_operation, args, [None] * self.slots if put_by is None else put_by.of_slots)
        if put_by is not None and put_by.of_ends and saved.ends is not None:
            run.d_ends = put_by.of_ends
            run.ends = {what.slot: row for what, row in zip(self.measured, saved.ends.unbind(), strict=True)}
        self._arrive(run, dys)
        self._sweep(run, free=not keeps_graph())
        return run.grads[: self.inputs], run.of_args

    def double_backward(
        self,
        saved: Saved,
        record: Record,
        args: list[Tensor],
        cotangents: tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]],
    ) -> tuple[list[Tensor | None], Gradients, PutBy]:
        """Return the cotangents of what arrived, of inputs and of parameters, and what is to be put by.

        Args:
            saved: by the forward pass.
            record: of the first backward pass.
            args: parameters.
            cotangents: of the gradients of inputs and parameters, and of the terms.
        """
        d_inputs, d_args, d_terms = cotangents
        run = DoubleBackward(saved.by_operation, args, [*d_inputs, *[None] * (self.slots - self.inputs)])
        run.d_args = list(d_args)
        self._spread(run, d_terms, saved, record)
        free = not keeps_graph()
        for operation in self._active:
            dy = record.by_operation[operation.index]
            operation.double_backward(run, dy)
            if free:
                record.by_operation[operation.index] = None
        of_inputs, run.put_by.of_slots[: self.inputs] = (
            run.put_by.of_slots[: self.inputs],
            [None] * self.inputs,
        )
        return [run.tangents[slot] for slot in self.outputs], (of_inputs, run.of_args), run.put_by

    def _arrive(self, run: Backward, dys: Sequence[Tensor | None]) -> None:
        for slot, dy in zip(self.outputs, dys, strict=True):
            if dy is not None:
                run.add(slot, dy, owned=False)

    def _sweep(self, run: Backward, *, free: bool = False) -> None:
        for operation in self._reversed:
            dy, run.grads[operation.out] = run.grads[operation.out], None
            if dy is None and operation.ends_slot in run.d_ends:
                dy = torch.zeros_like(operation.value(run))
            if dy is not None:
                operation.backward(run, dy)
            if free:
                run.saved[operation.index] = None

    def _terms(self, l1: dict[int, Tensor], saved: Saved, record: Record) -> list[Tensor | None]:
        """Return the term of each measured site: its norm, times the step with ``scale="step"``."""
        norms = [l1.get(number) for number in range(len(self.measured))]
        present = next((norm for norm in norms if norm is not None), None)
        if saved.steps is None or present is None:
            return norms
        zero = torch.zeros_like(present)
        record.l1 = torch.stack([zero if norm is None else norm for norm in norms])
        terms = (record.l1 * saved.steps).unbind()
        return [None if norm is None else term for norm, term in zip(norms, terms, strict=True)]

    def _spread(
        self, run: DoubleBackward, d_terms: Sequence[Tensor | None], saved: Saved, record: Record
    ) -> None:
        """Set the cotangent of each norm, and put by those of the ends of the tensors."""
        if saved.steps is None:
            run.d_l1 = {number: d for number, d in enumerate(d_terms) if d is not None}
            return
        if record.l1 is None or all(d is None for d in d_terms):
            return
        zero = torch.zeros_like(record.l1[0])
        d = torch.stack([zero if term is None else term for term in d_terms])
        run.d_l1 = dict(enumerate((d * saved.steps).unbind()))
        d_ends = _d_ends(d * record.l1, saved.ends, self.step_bits)  # type: ignore[arg-type]
        run.put_by.of_ends = {
            what.slot: row for what, row in zip(self.measured, d_ends.unbind(), strict=True)
        }


def _step_bits(measured: Sequence[Measured]) -> int | None:
    """Return the width at which steps are measured; None without steps.

    Raises:
        NotFittingError: penalties of different scales measure the sites.
    """
    widths = {what.quantizer.step_bits for what in measured}
    if len(widths) > 1:
        raise NotFittingError("sites are measured by different steps")
    return next(iter(widths), None)


def _steps(ends: Tensor, bits: int) -> Tensor:
    """Return the step of each row of ends, as ``functional.quantization_grid`` computes it."""
    return _unclamped_steps(ends, bits).clamp(min=torch.finfo(ends.dtype).tiny)


def _unclamped_steps(ends: Tensor, bits: int) -> Tensor:
    low, high = ends[:, 0].clamp(max=0), ends[:, 1].clamp(min=0)
    return high / (2**bits - 1) - low / (2**bits - 1)


def _d_ends(d_steps: Tensor, ends: Tensor, bits: int) -> Tensor:
    """Return the gradients of the ends, one row for each site."""
    passed = _unclamped_steps(ends, bits) >= torch.finfo(ends.dtype).tiny
    d = torch.where(passed, d_steps, 0)
    d_high = torch.where(ends[:, 1] >= 0, d / (2**bits - 1), 0)
    d_low = torch.where(ends[:, 0] <= 0, -d / (2**bits - 1), 0)
    return torch.stack([d_low, d_high], 1)
