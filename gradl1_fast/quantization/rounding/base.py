"""The interface of methods that choose the codes of a weight, and the problem that they are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["INPUTS", "Problem", "RoundingMethod"]

INPUTS = "renormalised", "rounded", "float"


@dataclass(frozen=True)
class Problem:
    """One weight, to be rounded so that the error of the layer's output is small.

    With ``W`` the rows of the weight and ``x`` what they are multiplied by, the error of codes ``Q`` is
    ``E |W x - s Q x|^2 = tr(D H D^T)`` with ``D = W - s Q`` and ``H = E[x x^T]``. Rows are independent.

    Where the layer is given ``x`` instead of ``y`` as in float, the error is ``E |W y - s Q x|^2``, which is
    the same with ``W E[y x^T] H^-1`` in the place of ``W``, and a constant more.

    Attributes:
        weight: rows to be approximated, ``(groups, rows, columns)``, float64.
        moments: ``H``, ``(groups, columns, columns)``, float64.
        scale: of each row, ``(groups, rows, 1)``, float64.
        q_min: smallest code.
        q_max: largest code.
    """

    weight: Tensor
    moments: Tensor
    scale: Tensor
    q_min: int
    q_max: int

    def nearest(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the codes nearest to values in the shape of the weight, or of some of its columns."""
        scale = self.scale if scale is None else scale
        return (weight / scale).round().clamp(self.q_min, self.q_max)

    def errors(self, codes: Tensor) -> Tensor:
        """Return the squared error of each row's output, ``(groups, rows)``."""
        return _quadratic(self.weight - codes * self.scale, self.moments)

    def power(self) -> Tensor:
        """Return the mean square of each row's output, ``(groups, rows)``."""
        return _quadratic(self.weight, self.moments)

    def better(self, codes: Tensor, others: Tensor) -> Tensor:
        """Return, row by row, the codes with the smaller error; of equal ones the second."""
        return torch.where((self.errors(codes) < self.errors(others))[..., None], codes, others)


class RoundingMethod(ABC):
    """How codes of a weight are chosen; a subclass overrides :meth:`codes`.

    Attributes:
        inputs: what layers are given; see :class:`gradl1_fast.rounding.GPTQ`.
    """

    inputs: str = "renormalised"

    @abstractmethod
    def codes(self, problem: Problem) -> Tensor:
        """Return codes, whole numbers within the grid, in the shape of the problem's weight."""


def _quadratic(rows: Tensor, moments: Tensor) -> Tensor:
    return ((rows @ moments) * rows).sum(-1)
