"""State of the passes of a region: values and gradients by slot, and what one pass saves for another.

A region runs in four passes. For each operation ``y = op(x)``:

- forward computes ``y``;
- backward, in reverse order, computes ``dx`` and ``dW`` from ``dy``. The first backward pass of double
  backprop saves each ``dy``;
- double backward, in order, computes the cotangents of ``dy``, ``x`` and ``W`` from those of ``dx`` and
  ``dW``;
- last backward is the same as backward, but starts from the sum of ``dy`` and the cotangent of ``y`` that
  double backward deferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Backward", "Deferred", "DoubleBackward", "Forward", "NotFittingError", "Record", "Saved"]


class NotFittingError(RuntimeError):
    """The tensors of a call do not fit a region; the message says why."""


class Saved:
    """What a forward pass saves for later passes.

    Attributes:
        by_operation: the values that each operation saves.
        steps: ``(sites,)``, the quantization step at each measured site; None without ``scale="step"``.
        unlimited: ``(sites,)``, the steps without their lower limit; None without ``scale="step"``.
        ends: ``(sites, 4)``, the ends of the tensor at each measured site; None without ``scale="step"``.
        ends_of_slots: the same ends, by the slot of the tensor.
    """

    __slots__ = ("_deferred", "by_operation", "ends", "ends_of_slots", "steps", "unlimited")

    def __init__(self, count: int) -> None:
        self.by_operation: list[Any] = [None] * count
        self.steps: Tensor | None = None
        self.unlimited: Tensor | None = None
        self.ends: Tensor | None = None
        self.ends_of_slots: dict[int, Tensor] = {}
        self._deferred: dict[int, list[Deferred]] = {}

    def defer(self, deferred: Deferred) -> None:
        """Keep cotangents for the last backward pass of the running graph task.

        Those of other tasks stay: a hook may run a task of its own inside another one.
        """
        self._deferred.setdefault(task(), []).append(deferred)

    def take_deferred(self) -> Deferred | None:
        """Return the sum of the cotangents that were deferred in the running graph task."""
        found = self._deferred.pop(task(), [])
        for other in found[1:]:
            found[0].add(other)
        return found[0] if found else None


@dataclass
class Deferred:
    """Cotangents of the tensors of a region, by slot, for the last backward pass.

    Attributes:
        of_slots: the cotangent of each tensor, or None.
        of_ends: ``(2,)``, the cotangents of the tensor's smallest and largest value.
        of_weights: the indices of some parameters, their ends, and ``(n, 2)``, the cotangents of the smallest
            and the largest value of each; see :mod:`gradl1_fast.conversion.regions.weights`.
    """

    of_slots: list[Tensor | None]
    of_ends: dict[int, Tensor] = field(default_factory=dict)
    of_weights: list[tuple[Sequence[int], Tensor, Tensor]] = field(default_factory=list)

    def add(self, other: Deferred) -> None:
        """Add other cotangents that were deferred in the same graph task."""
        for slot, value in enumerate(other.of_slots):
            total = self.of_slots[slot]
            if value is not None:
                self.of_slots[slot] = value if total is None else total + value
        for slot, value in other.of_ends.items():
            self.of_ends[slot] = self.of_ends[slot] + value if slot in self.of_ends else value
        self.of_weights = [*self.of_weights, *other.of_weights]


class Record:
    """What the first backward pass saves for double backward.

    Attributes:
        by_operation: the gradient of the result of each operation.
        l1: ``(sites,)``, the norm at each measured site; None without measured sites.
    """

    __slots__ = ("by_operation", "l1")

    def __init__(self, count: int) -> None:
        self.by_operation: list[Any] = [None] * count
        self.l1: Tensor | None = None


class Forward:
    """The state of a forward pass.

    Attributes:
        values: the tensors, by slot.
        args: the parameters of the region, in order.
        saved: what each operation saves for later passes; None without gradients.
        ends: by slot, the smallest and largest value of tensors whose norm is multiplied by the step.
        statistics: for each batch norm in training: module, mean, 1/std and number of values in a channel.
    """

    __slots__ = ("args", "ends", "saved", "statistics", "values")

    def __init__(self, slots: int, args: list[Tensor], saved: list[Any] | None) -> None:
        self.values: list[Any] = [None] * slots
        self.args, self.saved = args, saved
        self.ends: dict[int, Tensor] = {}
        self.statistics: list[tuple[Any, Tensor, Tensor, int]] = []


class Backward:
    """The state of a backward pass, either the first of double backprop, which saves a record, or the last.

    Attributes:
        saved: what each operation saved in the forward pass.
        args: the parameters of the region.
        record: the gradient of the result of each operation; None in the last pass.
        l1: the norms of the measured sites, set by the first pass.
        of_weights: whether gradients of weights are requested.
        of_others: whether gradients of other parameters are requested.
        grads: the gradients of the tensors, by slot.
        of_args: the gradients of the parameters.
        ends: by slot, the smallest and largest value of tensors; set in the last pass.
        d_ends: the gradients of ``ends``; set in the last pass.
    """

    __slots__ = (
        "args", "d_ends", "ends", "grads", "l1", "of_args", "of_others", "of_weights", "owned", "record",
        "saved",
    )  # fmt: skip

    def __init__(self, saved: list[Any], args: list[Tensor], grads: list[Tensor | None]) -> None:
        self.saved, self.args, self.grads = saved, args, grads
        self.owned = [grad is not None for grad in grads]
        self.record: list[Any] | None = None
        self.l1: dict[int, Tensor] = {}
        self.of_weights = self.of_others = True
        self.of_args: list[Tensor | None] = [None] * len(args)
        self.ends: dict[int, Tensor] = {}
        self.d_ends: dict[int, Tensor] = {}

    def add(self, slot: int, grad: Tensor, *, owned: bool = True) -> None:
        """Add a gradient to a slot; an ``owned`` gradient has no other reader and may be changed in place."""
        total = self.grads[slot]
        if total is None:
            self.grads[slot], self.owned[slot] = grad, owned
        elif self.owned[slot]:
            total.add_(grad)
        else:
            self.grads[slot], self.owned[slot] = total + grad, True

    def give(self, arg: int, grad: Tensor) -> None:
        """Add a gradient to a parameter."""
        total = self.of_args[arg]
        self.of_args[arg] = _like(grad, self.args[arg]) if total is None else total + grad


class DoubleBackward:
    """The state of a double backward pass.

    Attributes:
        saved: what each operation saved in the forward pass.
        args: the parameters of the region.
        tangents: by slot, the cotangent of the tensor's gradient.
        d_args: the cotangents of the gradients of the parameters.
        d_l1: the cotangent of the norm of each measured site.
        deferred: the cotangents of the tensors, for the last backward pass.
        of_args: the cotangents of the parameters.
    """

    __slots__ = ("args", "d_args", "d_l1", "deferred", "of_args", "saved", "tangents")

    def __init__(self, saved: list[Any], args: list[Tensor], tangents: list[Tensor | None]) -> None:
        self.saved, self.args, self.tangents = saved, args, tangents
        self.d_args: list[Tensor | None] = [None] * len(args)
        self.d_l1: dict[int, Tensor] = {}
        self.deferred = Deferred([None] * len(tangents))
        self.of_args: list[Tensor | None] = [None] * len(args)

    def add(self, slot: int, value: Tensor) -> None:
        """Add a cotangent to the tensor in a slot; ``value`` must have no other reader."""
        total = self.deferred.of_slots[slot]
        self.deferred.of_slots[slot] = value if total is None else total.add_(value)

    def give(self, arg: int, value: Tensor) -> None:
        """Add a cotangent to a parameter."""
        total = self.of_args[arg]
        self.of_args[arg] = _like(value, self.args[arg]) if total is None else total + value


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def task() -> int:
    """Return the number of the running graph task of autograd."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Return whether the running graph task retains the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
