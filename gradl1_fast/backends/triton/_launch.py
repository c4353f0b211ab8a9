"""What the launch wrappers share: layouts, types, sizes of blocks, and the finish of a sum.

A kernel walks over memory, not over indices: any dense tensor, whatever the order of its dimensions,
is a line of numbers. A tensor with gaps or overlaps (sliced, expanded), and one whose layout differs
from that of the result, is first copied into the layout of the result.
"""

from __future__ import annotations

import contextlib
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.triton._device import finish_kernel

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of ``x`` current, so that kernels go to its current stream."""
    return torch.cuda.device_of(x)


def blocks(n: int) -> int:
    """Return the number of blocks that cover ``n`` elements."""
    return triton.cdiv(n, BLOCK)


def acc(dtype: torch.dtype) -> Any:
    """Return Triton's type of the sums of values of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(x: Tensor) -> Tensor:
    """Return ``x``, or a copy without gaps and overlaps where it has some."""
    if x.is_neg():
        x = x.resolve_neg()  # its memory holds the opposite of its values
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return torch.empty_like(x).copy_(x)
        expected *= size
    return x


@overload
def in_layout_of(x: Tensor, like: Tensor) -> Tensor: ...
@overload
def in_layout_of(x: Tensor | None, like: Tensor) -> Tensor | None: ...
def in_layout_of(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``x``, or a copy with the strides of the dense tensor ``like`` where they differ."""
    if x is not None and x.is_neg():
        x = x.resolve_neg()  # its memory holds the opposite of its values
    if (
        x is None
        or x.stride() == like.stride()
        or all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), like.stride(), strict=True))
    ):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def partials(x: Tensor, *shape: int) -> Tensor:
    """Return room for partial sums of values like those of ``x``."""
    return torch.empty(shape, dtype=sum_dtype(x.dtype), device=x.device)


def finish(values: Tensor, outs: tuple[Tensor, ...]) -> None:
    """Sum ``values`` of ``(len(outs), rows, columns)`` over the rows, each k into ``outs[k]``."""
    _, rows, columns = values.shape
    width = min(triton.next_power_of_2(columns), 32)
    finish_kernel[(triton.cdiv(columns, width),)](
        values, outs, rows, columns, ACC=acc(values.dtype), ROWS=1024 // width, COLS=width, **OPTIONS
    )


def total(values: Tensor) -> Tensor:
    """Return the sum of all ``values`` as a scalar."""
    out = partials(values)
    finish(values.view(1, -1, 1), (out,))
    return out
