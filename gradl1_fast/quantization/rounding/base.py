"""The interface of rounding methods, and the problem that they solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["INPUTS", "Problem", "RoundingMethod"]

INPUTS = "renormalised", "rounded", "float"


@dataclass(frozen=True)
class Problem:
    """The problem of rounding a weight with a small error of the layer's output.

    With the rows ``W`` of the weight and their operand ``x``, the error of codes ``Q`` is
    ``E |W x - s Q x|^2 = tr(D H D^T)`` with ``D = W - s Q`` and ``H = E[x x^T]``. Rows are independent.

    If the input is ``x`` instead of the float input ``y``, the error is ``E |W y - s Q x|^2``. This equals
    the error above with ``W`` replaced by ``W E[y x^T] H^-1``, up to a constant.

    Attributes:
        weight: the rows to approximate, ``(groups, rows, columns)``, float64.
        moments: ``H``, ``(groups, columns, columns)``, float64.
        scale: the scale of each row, ``(groups, rows, 1)``, float64.
        q_min: smallest code.
        q_max: largest code.
    """

    weight: Tensor
    moments: Tensor
    scale: Tensor
    q_min: int
    q_max: int

    def nearest(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the nearest codes of values in the shape of the weight, or of some of its columns."""
        scale = self.scale if scale is None else scale
        return (weight / scale).round().clamp(self.q_min, self.q_max)

    def errors(self, codes: Tensor) -> Tensor:
        """Return the squared error of each row's output, ``(groups, rows)``."""
        return _quadratic(self.weight - codes * self.scale, self.moments)

    def power(self) -> Tensor:
        """Return the mean square of each row's output, ``(groups, rows)``."""
        return _quadratic(self.weight, self.moments)

    def better(self, codes: Tensor, others: Tensor) -> Tensor:
        """Return, for each row, the codes with the smaller error; the second ones if equal."""
        return torch.where((self.errors(codes) < self.errors(others))[..., None], codes, others)


class RoundingMethod(ABC):
    """Base class of methods that choose the codes of a weight; subclasses override :meth:`codes`.

    Attributes:
        inputs: the inputs of layers; see :class:`gradl1_fast.rounding.GPTQ`.
    """

    inputs: str = "renormalised"

    @abstractmethod
    def codes(self, problem: Problem) -> Tensor:
        """Return the codes, whole numbers within the grid, in the shape of the problem's weight."""


def _quadratic(rows: Tensor, moments: Tensor) -> Tensor:
    return ((rows @ moments) * rows).sum(-1)
