"""What the passes of a region work on: values and gradients by slot, and what one pass leaves for another.

A region runs in four passes. With ``y = op(x)`` for each operation in order:

- forward: ``y``;
- backward, in reverse order: ``dx`` and ``dW`` from ``dy``. The first of double backprop keeps each ``dy``;
- double backward, in order: from the cotangents of ``dx`` and ``dW`` that of ``dy``, and those of ``x``
  and ``W`` themselves;
- last backward: as backward, from the sum of ``dy`` and of what double backward put by for ``y``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Backward", "DoubleBackward", "Forward", "NotFittingError", "PutBy", "Record", "Saved"]


class NotFittingError(RuntimeError):
    """The tensors of a call do not fit a region; the message says why."""


class Saved:
    """What a forward pass keeps for those after it.

    Attributes:
        by_operation: whatever an operation needs of its forward pass.
        steps: the quantization step at each measured site; None without ``scale="step"``.
        ends: the ends of the tensors at these sites, one row each; None likewise.
        put_by: what double backward passes left for the last, with the number of the graph task of each.
    """

    __slots__ = ("by_operation", "ends", "put_by", "steps")

    def __init__(self, count: int) -> None:
        self.by_operation: list[Any] = [None] * count
        self.steps: Tensor | None = None
        self.ends: Tensor | None = None
        self.put_by: list[tuple[int, PutBy]] = []


@dataclass
class PutBy:
    """Cotangents of tensors inside a region, by slot.

    Attributes:
        of_slots: of the tensor itself; None where there is none.
        of_ends: of its ends, two numbers.
    """

    of_slots: list[Tensor | None]
    of_ends: dict[int, Tensor] = field(default_factory=dict)

    def add(self, other: PutBy) -> None:
        """Add what another double backward pass of the same graph task put by."""
        for slot, value in enumerate(other.of_slots):
            own = self.of_slots[slot]
            if value is not None:
                self.of_slots[slot] = value if own is None else own + value
        for slot, value in other.of_ends.items():
            self.of_ends[slot] = self.of_ends[slot] + value if slot in self.of_ends else value


class Record:
    """What the first backward pass keeps for double backward.

    Attributes:
        by_operation: the gradient that arrived at each operation.
        l1: the norm at each measured site, a vector; None without sites.
    """

    __slots__ = ("by_operation", "l1")

    def __init__(self, count: int) -> None:
        self.by_operation: list[Any] = [None] * count
        self.l1: Tensor | None = None


class Forward:
    """A forward pass.

    Attributes:
        values: by slot.
        args: parameters of the region, in its order.
        saved: where operations keep what they need later; None without gradients.
        ends: of the tensors in slots that are measured by their step.
        statistics: of each batch norm in training, with its tensor: module, mean, 1/std, values in a channel.
    """

    __slots__ = ("args", "ends", "saved", "statistics", "values")

    def __init__(self, slots: int, args: list[Tensor], saved: list[Any] | None) -> None:
        self.values: list[Any] = [None] * slots
        self.args, self.saved = args, saved
        self.ends: dict[int, Tensor] = {}
        self.statistics: list[tuple[Any, Tensor, Tensor, int]] = []


class Backward:
    """A backward pass: the first of double backprop, which records, or the last.

    Attributes:
        saved: by the forward pass, by operation.
        args: parameters of the region.
        record: where operations keep what arrived; None in the last pass.
        l1: norms by the number of the site; filled by the first pass.
        of_weights: whether gradients of weights are wanted.
        of_others: whether gradients of other parameters are.
        grads: by slot.
        of_args: of the parameters.
        ends: of the tensors in slots, and
        d_ends: their gradients; in the last pass.
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
        """Add a gradient of a slot; one that is ``owned`` is nobody else's, and may be changed."""
        present = self.grads[slot]
        if present is None:
            self.grads[slot], self.owned[slot] = grad, owned
        elif self.owned[slot]:
            present.add_(grad)
        else:
            self.grads[slot], self.owned[slot] = present + grad, True

    def give(self, arg: int, grad: Tensor) -> None:
        """Add the gradient of a parameter."""
        present = self.of_args[arg]
        self.of_args[arg] = _like(grad, self.args[arg]) if present is None else present + grad


class DoubleBackward:
    """A double backward pass.

    Attributes:
        saved: by the forward pass, by operation.
        args: parameters of the region.
        tangents: by slot, the cotangent of its gradient.
        d_args: the cotangents of the gradients of parameters.
        d_l1: by the number of the site, the cotangent of the norm.
        put_by: the cotangents of the tensors in the slots.
        of_args: of the parameters.
    """

    __slots__ = ("args", "d_args", "d_l1", "of_args", "put_by", "saved", "tangents")

    def __init__(self, saved: list[Any], args: list[Tensor], tangents: list[Tensor | None]) -> None:
        self.saved, self.args, self.tangents = saved, args, tangents
        self.d_args: list[Tensor | None] = [None] * len(args)
        self.d_l1: dict[int, Tensor] = {}
        self.put_by = PutBy([None] * len(tangents))
        self.of_args: list[Tensor | None] = [None] * len(args)

    def add(self, slot: int, value: Tensor) -> None:
        """Add a cotangent of the tensor in a slot, which is nobody else's."""
        present = self.put_by.of_slots[slot]
        self.put_by.of_slots[slot] = value if present is None else present.add_(value)

    def give(self, arg: int, value: Tensor) -> None:
        """Add a cotangent of a parameter."""
        present = self.of_args[arg]
        self.of_args[arg] = _like(value, self.args[arg]) if present is None else present + value


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def task() -> int:
    """Return the number of the graph task that autograd is running."""
    return torch._C._current_graph_task_id()


def keeps_graph() -> bool:
    """Return whether the graph task that is running leaves the graph to another."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
