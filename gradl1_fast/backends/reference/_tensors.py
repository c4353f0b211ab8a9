"""Helpers of the reference operations: types of sums, layout of outputs, the l1 term."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in the type in which it is summed."""
    return x.to(sum_dtype(x.dtype))


def in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    """Return ``out`` with the type of ``x`` and the strides of ``torch.empty_like(x)``."""
    same = (out.dtype, out.stride()) == (x.dtype, x.stride())
    if same and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return out  # the common case needs no copy
    like = torch.empty_like(x)
    return out if (out.dtype, out.stride()) == (like.dtype, like.stride()) else like.copy_(out)


def absent(like: Tensor) -> Tensor:
    """Return the empty tensor that stands for a result that was not requested."""
    return like.new_empty((0,))


def l1(x: Tensor) -> Tensor:
    """Return ``sum |x|`` as a scalar in the type of the sums of ``x``."""
    return x.abs().sum(dtype=sum_dtype(x.dtype))


def add_l1_gradient(d_dy: Tensor | None, d_l1: Tensor | None, dy: Tensor, like: Tensor) -> Tensor:
    """Return ``d_dy + d_l1 * sign(dy)`` in the type and layout of ``like``; a missing term counts as zero."""
    if d_l1 is None:
        return torch.zeros_like(like) if d_dy is None else in_layout_of(d_dy, like)
    term = widen(dy).sign().mul_(d_l1)
    return in_layout_of(term if d_dy is None else term.add_(d_dy), like)
