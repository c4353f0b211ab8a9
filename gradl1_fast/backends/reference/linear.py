"""Linear layer: matrix products in all passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import absent


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``y = x @ weight.T + bias`` for ``x`` of ``(*, in)`` and ``weight`` of ``(out, in)``."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Return ``dx = dy @ weight`` and ``dweight = dy.T @ x``, each if requested by the mask."""
    dx = dy @ weight if output_mask[0] else absent(x)
    dweight = _wgrad(dy, x) if output_mask[1] else absent(weight)
    return dx, dweight


def linear_double_backward(
    d_dx: Tensor | None,
    d_dweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight``, each if requested by the mask.

    ``d_dy = d_dx @ weight.T + x @ d_dweight.T``, ``d_x = dy @ d_dweight``, ``d_weight = dy.T @ d_dx``.
    """
    d_dy, d_x, d_weight = absent(dy), absent(x), absent(weight)
    if output_mask[0]:
        terms = [d_dx @ weight.t()] if d_dx is not None else []
        terms += [x @ d_dweight.t()] if d_dweight is not None else []
        d_dy = torch.zeros_like(dy) if not terms else terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
    if output_mask[1]:
        d_x = torch.zeros_like(x) if d_dweight is None else dy @ d_dweight
    if output_mask[2]:
        d_weight = torch.zeros_like(weight) if d_dx is None else _wgrad(dy, d_dx)
    return d_dy, d_x, d_weight


def _wgrad(dy: Tensor, x: Tensor) -> Tensor:
    rows = math.prod(x.shape[:-1])  # -1 is ambiguous if there are no features
    return dy.reshape(rows, dy.shape[-1]).t() @ x.reshape(rows, x.shape[-1])
