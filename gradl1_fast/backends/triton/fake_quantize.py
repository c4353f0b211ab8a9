"""Fake quantization's passes, bit for bit those of the reference.

Forward reads x and writes y. Backward reads dy and x, writes dx and sums |dy| in the same pass. Double
backward reads d_dx, dy and x and writes d_dy. The channel of an element follows from its place in
memory: in a dense tensor it is ``place // stride % channels``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast.backends.reference._tensors import absent, in_layout_of
from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._device import narrow, sign, widen
from gradl1_fast.backends.triton._quantizer import mask_of_codes, quantized
from gradl1_fast.backends.triton.tap import tap_double_backward

_ANY_NUMBER = ["q_min", "q_max"]  # one kernel serves every bit width


@triton.jit
def _qparams_of(
    scale, zero_point, block, inner, channels, period,
    PER_CHANNEL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the scale and the zero point of each element of a block."""
    channel = 0
    if PER_CHANNEL:
        # One 64-bit remainder for the whole block; INDEX is as narrow as the rest allows.
        place = (block * BLOCK % period).to(INDEX) + tl.arange(0, BLOCK)
        channel = place // inner % channels
    return tl.load(scale + channel).to(ACC), tl.load(zero_point + channel).to(ACC)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _fake_quantize_forward_kernel(
    x, scale, zero_point, y, n, q_min, q_max, inner, channels, period,
    PER_CHANNEL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    s, z = _qparams_of(scale, zero_point, block, inner, channels, period, PER_CHANNEL, INDEX, ACC, BLOCK)
    levels = quantized(widen(tl.load(x + at, mask=at < n, other=0), ACC), s, z, q_min, q_max)
    tl.store(y + at, narrow(levels, y.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _fake_quantize_backward_kernel(
    dy, x, scale, zero_point, dx, partials, n, q_min, q_max, inner, channels, period,
    PER_CHANNEL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    s, z = _qparams_of(scale, zero_point, block, inner, channels, period, PER_CHANNEL, INDEX, ACC, BLOCK)
    mask = mask_of_codes(widen(tl.load(x + at, mask=at < n, other=0), ACC), s, z, q_min, q_max)
    gradient = widen(tl.load(dy + at, mask=at < n, other=0), ACC)
    # dx = mask * dy
    tl.store(dx + at, narrow(tl.where(mask, gradient, 0), dx.dtype.element_ty), mask=at < n)
    if partials is not None:  # l1 = sum |dy|, before the mask
        tl.store(partials + block, tl.sum(tl.abs(gradient)))


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _fake_quantize_double_backward_kernel(
    d_dx, d_l1, dy, x, scale, zero_point, d_dy, n, q_min, q_max, inner, channels, period,
    PER_CHANNEL: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    s, z = _qparams_of(scale, zero_point, block, inner, channels, period, PER_CHANNEL, INDEX, ACC, BLOCK)
    mask = mask_of_codes(widen(tl.load(x + at, mask=at < n, other=0), ACC), s, z, q_min, q_max)
    # d_dy = mask * d_dx + d_l1 * sign(dy)
    out = tl.where(mask, widen(tl.load(d_dx + at, mask=at < n, other=0), ACC), 0)
    if d_l1 is not None:
        out += sign(widen(tl.load(dy + at, mask=at < n, other=0), ACC)) * tl.load(d_l1).to(ACC)
    tl.store(d_dy + at, narrow(out, d_dy.dtype.element_ty), mask=at < n)


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
) -> Tensor:
    """Return ``s * (clamp(rint(x / s) + z, q_min, q_max) - z)``; clamping happens in floating point."""
    y = torch.empty_like(x)
    if n := x.numel():
        with _launch.on_device_of(x):
            scale, zero_point, shape = _qparams(y, scale, zero_point, axis)
            x = _launch.in_layout_of(x, y)
            _fake_quantize_forward_kernel[(_launch.blocks(n),)](
                x, scale, zero_point, y, n, q_min, q_max, **shape
            )
    return y


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    axis: int | None,
    with_l1: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``dx = dy`` where the code was not clamped and 0 elsewhere, and ``l1 = sum |dy|``."""
    dx, n = torch.empty_like(x), x.numel()
    if n == 0:
        return dx, _launch.partials(dy).zero_() if with_l1 else absent(dy)
    with _launch.on_device_of(x):
        scale, zero_point, shape = _qparams(dx, scale, zero_point, axis)
        dy, x = _launch.in_layout_of(dy, dx), _launch.in_layout_of(x, dx)
        sums = _launch.partials(dy, _launch.blocks(n)) if with_l1 else None
        _fake_quantize_backward_kernel[(_launch.blocks(n),)](
            dy, x, scale, zero_point, dx, sums, n, q_min, q_max, **shape
        )
        return dx, absent(dy) if sums is None else _launch.total(sums)


def fake_quantize_double_backward(
    d_dx: Tensor | None,
    d_l1: Tensor | None,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    axis: int | None,
) -> Tensor:
    """Return ``d_dy = mask * d_dx + d_l1 * sign(dy)``."""
    if d_dx is None:
        return in_layout_of(tap_double_backward(None, d_l1, dy), x)
    d_dy = torch.empty_like(x)
    if n := dy.numel():
        with _launch.on_device_of(dy):
            scale, zero_point, shape = _qparams(d_dy, scale, zero_point, axis)
            d_dx, dy, x = (_launch.in_layout_of(t, d_dy) for t in (d_dx, dy, x))
            _fake_quantize_double_backward_kernel[(_launch.blocks(n),)](
                d_dx, d_l1, dy, x, scale, zero_point, d_dy, n, q_min, q_max, **shape
            )
    return d_dy


def _qparams(
    like: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return dense scale and zero point, and arguments that give the channel of each element."""
    channels, inner = (1, 1) if axis is None else (like.shape[axis], like.stride(axis))
    period = channels * inner
    shape = {
        "inner": inner,
        "channels": channels,
        "period": period,
        "PER_CHANNEL": channels > 1,
        "INDEX": tl.int32 if period + _launch.BLOCK < 2**31 else tl.int64,
        "ACC": _launch.acc(like.dtype),
        "BLOCK": _launch.BLOCK,
        **_launch.OPTIONS,
    }
    return scale.contiguous(), zero_point.contiguous(), shape
