"""The ends of a tensor: its extremes and how many values are equal to each, without atomics.

Every lane keeps the extremes of what it has seen and their counts, every program writes those of its
lanes into slots of its own, and one program combines the slots. NaN is counted apart: both extremes are
NaN then, and no value is equal to them, as in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._device import divide

PARTIALS = 5  # low, its count, high, its count, the number of NaNs


@triton.jit
def extended(value, in_bounds, low, low_count, high, high_count, nans):
    """Return the ends of each lane, extended by one value where it is present."""
    one = in_bounds.to(nans.dtype)
    lower, higher = in_bounds & (value < low), in_bounds & (value > high)
    low_count = tl.where(lower, 1, low_count + tl.where(value == low, one, 0))
    high_count = tl.where(higher, 1, high_count + tl.where(value == high, one, 0))
    low = tl.where(lower, value, low)
    high = tl.where(higher, value, high)
    nans += tl.where(value != value, one, 0)
    return low, low_count, high, high_count, nans


@triton.jit
def store_ends(partials, program, programs, low, low_count, high, high_count, nans):
    """Store the ends of all lanes in the slots of this program."""
    lowest, highest = tl.min(low), tl.max(high)
    programs = programs.to(tl.int64)
    slot = partials + program.to(tl.int64)
    tl.store(slot, lowest)
    tl.store(slot + programs, tl.sum(tl.where(low == lowest, low_count, 0)))
    tl.store(slot + 2 * programs, highest)
    tl.store(slot + 3 * programs, tl.sum(tl.where(high == highest, high_count, 0)))
    tl.store(slot + 4 * programs, tl.sum(nans))


@triton.jit
def _ends_finish_kernel(partials, ends, programs, BLOCK: tl.constexpr):
    """Combine the slots of all programs; counts are in float64, in which they are exact."""
    T: tl.constexpr = partials.dtype.element_ty
    programs = programs.to(tl.int64)
    low = tl.full((BLOCK,), float("inf"), T)
    high = tl.full((BLOCK,), float("-inf"), T)
    low_count = tl.zeros((BLOCK,), tl.float64)
    high_count = tl.zeros((BLOCK,), tl.float64)
    nans = tl.zeros((BLOCK,), T)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        in_bounds = at < programs
        value = tl.load(partials + at, mask=in_bounds, other=float("inf"))
        count = tl.load(partials + programs + at, mask=in_bounds, other=0).to(tl.float64)
        low_count = tl.where(value < low, count, low_count + tl.where(value == low, count, 0))
        low = tl.where(value < low, value, low)
        value = tl.load(partials + 2 * programs + at, mask=in_bounds, other=float("-inf"))
        count = tl.load(partials + 3 * programs + at, mask=in_bounds, other=0).to(tl.float64)
        high_count = tl.where(value > high, count, high_count + tl.where(value == high, count, 0))
        high = tl.where(value > high, value, high)
        nans += tl.load(partials + 4 * programs + at, mask=in_bounds, other=0)
    lowest, highest, nan = tl.min(low), tl.max(high), tl.sum(nans) > 0
    one = tl.full((), 1, tl.int64)
    tl.store(ends, tl.where(nan, float("nan"), lowest))
    tl.store(ends + one, tl.where(nan, float("nan"), highest))
    tl.store(ends + 2 * one, tl.where(nan, 0, tl.sum(tl.where(low == lowest, low_count, 0))).to(T))
    tl.store(ends + 3 * one, tl.where(nan, 0, tl.sum(tl.where(high == highest, high_count, 0))).to(T))


@triton.jit
def shares_of(ends, d_ends, ACC: tl.constexpr):
    """Return both extremes and the gradient per value equal to each; arbitrary without ``d_ends``."""
    if d_ends is None:
        low, high = tl.full((), 0, ACC), tl.full((), 0, ACC)
        low_share, high_share = low, high
    else:
        one = tl.full((), 1, tl.int64)
        low, high = tl.load(ends).to(ACC), tl.load(ends + one).to(ACC)
        low_share = divide(tl.load(d_ends).to(ACC), tl.load(ends + 2 * one).to(ACC))
        high_share = divide(tl.load(d_ends + one).to(ACC), tl.load(ends + 3 * one).to(ACC))
    return low, high, low_share, high_share


@triton.jit
def with_share(dy, value, low, high, low_share, high_share):
    """Return ``dy`` plus the gradient through the ends; an infinite share gives NaN, as in PyTorch."""
    dy += (value == low).to(dy.dtype) * low_share
    return dy + (value == high).to(dy.dtype) * high_share


def ends_finisher(programs: int) -> _launch.Launch:
    """Return the launch that combines the ends of ``programs`` parts."""
    arguments = {"programs": programs, "BLOCK": _launch.BLOCK}
    return _launch.Launch(_ends_finish_kernel, 1, **arguments, **_launch.OPTIONS)
