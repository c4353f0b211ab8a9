"""The tap's passes: backward reads dy once; double backward reads d_dx and dy once and writes d_dy.

The ends of x take one read; their gradient takes one read of x and dy and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._device import narrow, sign, widen
from gradl1_fast.backends.triton._ends import extended, shares_of, store_ends, with_share


@triton.jit
def _tap_backward_kernel(dy, partials, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = widen(tl.load(dy + at, mask=at < n, other=0), ACC)
    tl.store(partials + block, tl.sum(tl.abs(value)))


@triton.jit
def _tap_double_backward_kernel(d_dx, d_l1, dy, d_dy, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # d_dy = d_dx + d_l1 * sign(dy)
    out = sign(widen(tl.load(dy + at, mask=at < n, other=0), ACC)) * tl.load(d_l1).to(ACC)
    if d_dx is not None:
        out += widen(tl.load(d_dx + at, mask=at < n, other=0), ACC)
    tl.store(d_dy + at, narrow(out, d_dy.dtype.element_ty), mask=at < n)


@triton.jit
def _tap_ends_kernel(x, partials, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.full((BLOCK,), float("inf"), ACC), tl.full((BLOCK,), float("-inf"), ACC)
    none = tl.zeros((BLOCK,), ACC)
    value = widen(tl.load(x + at, mask=at < n, other=0), ACC)
    low, low_count, high, high_count, nans = extended(value, at < n, low, none, high, none, none)
    store_ends(partials, block, tl.num_programs(0), low, low_count, high, high_count, nans)


@triton.jit
def _tap_add_ends_gradient_kernel(dy, x, ends, d_ends, out, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high, low_share, high_share = shares_of(ends, d_ends, ACC)
    total = tl.zeros((BLOCK,), ACC)
    if dy is not None:
        total = widen(tl.load(dy + at, mask=at < n, other=0), ACC)
    value = widen(tl.load(x + at, mask=at < n, other=0), ACC)
    total = with_share(total, value, low, high, low_share, high_share)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=at < n)


def tap_backward(dy: Tensor) -> Tensor:
    """Return ``l1 = sum |dy|``; ``dx`` is ``dy`` itself and is not copied."""
    n = dy.numel()
    if n == 0:
        return _launch.partials(dy).zero_()
    with _launch.on_device_of(dy):
        sums = _launch.partials(dy, _launch.blocks(n))
        _tap_backward_kernel[(len(sums),)](
            _launch.dense(dy), sums, n, ACC=_launch.acc(dy.dtype), BLOCK=_launch.BLOCK, **_launch.OPTIONS
        )
        return _launch.total(sums)


def tap_double_backward(d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
    """Return ``d_dy = d_dx + d_l1 * sign(dy)``, where ``sign(0) = 0``."""
    d_dy = torch.empty_like(dy)
    if d_l1 is None:
        return d_dy.zero_() if d_dx is None else d_dy.copy_(d_dx)
    n = dy.numel()
    if n:
        with _launch.on_device_of(dy):
            _tap_double_backward_kernel[(_launch.blocks(n),)](
                _launch.in_layout_of(d_dx, d_dy),
                d_l1,
                _launch.in_layout_of(dy, d_dy),
                d_dy,
                n,
                ACC=_launch.acc(dy.dtype),
                BLOCK=_launch.BLOCK,
                **_launch.OPTIONS,
            )
    return d_dy
