"""The kernels of `batch_norm_act`; the derivation stands in the reference, the walk in `_tiles`.

``quantizer`` is None or ``(scale, zero_point, q_min, q_max)``; the codes are floating, so that there is
no kernel of its own for every bit-width. ``ends`` are None or, in the forward, room for the extremes of y
and, in the backward, those extremes with ``d_ends``, their gradients.
"""

import triton
import triton.language as tl

from gradl1_fast.backends.triton._device import divide, narrow, sign, square_root, widen
from gradl1_fast.backends.triton._ends import extended, shares_of, store_ends, with_share
from gradl1_fast.backends.triton._quantizer import quantized, within
from gradl1_fast.backends.triton._tiles import (
    channel_of,
    load,
    of_channel,
    place,
    store_of_channel,
    store_partial,
    store_sum,
    sum_of_channel,
    tile,
)


@triton.jit
def _normalised(x, mean, scale, bias):
    """Return ``(x - mean) * scale + bias``: the one formula of the forward and of every mask."""
    return (x - mean) * scale + bias


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """Return ``act(z)``; NaN stays NaN."""
    if ACTIVATION != "none":
        z = tl.where(z <= 0, 0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z >= 6, 6, z)
    return z


@triton.jit
def _grid_of(quantizer, ACC: tl.constexpr):
    """Return the quantizer's scale and zero point, loaded once for all tiles; without one, anything."""
    if quantizer is None:
        s, z = tl.full((), 1, ACC), tl.full((), 0, ACC)
    else:
        s, z = tl.load(quantizer[0]).to(ACC), tl.load(quantizer[1]).to(ACC)
    return s, z


@triton.jit
def _stored(
    x, mean, scale, bias, activated, at, inside, T: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr
):
    """Return the output of the activation as it was stored, rounded to its type: read, or recomputed."""
    if activated is None:
        out = widen(narrow(_activated(_normalised(x, mean, scale, bias), ACTIVATION), T), ACC)
    else:
        out = load(activated, at, inside, ACC)
    return out


@triton.jit
def _slope(out, quantizer, s, z, inside, ACTIVATION: tl.constexpr):
    """Return where the output of the activation shows slope 1, and its code is not clamped."""
    passes = inside
    if ACTIVATION == "relu":
        passes = (out <= 0) == 0  # as PyTorch's threshold does: NaN passes
    if ACTIVATION == "relu6":
        passes = (out > 0) & (out < 6)
    if quantizer is not None:
        passes &= within(out, s, z, quantizer[2], quantizer[3])
    return passes


@triton.jit
def _passes(
    x, mean, scale, bias, activated, quantizer, s, z, at, inside,
    T: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return where the activation has slope 1 and the code, if there is a quantizer, is not clamped.

    It follows from ``activated`` if given, else from the forward's own arithmetic: the output of the
    activation is recomputed as it was stored, rounded to its type, so that both ways agree.
    """
    passes = inside
    if ACTIVATION != "none" or quantizer is not None:
        out = _stored(x, mean, scale, bias, activated, at, inside, T, ACTIVATION, ACC)
        passes = _slope(out, quantizer, s, z, inside, ACTIVATION)
    return passes


@triton.jit
def _origin(x, at, inside, ACC: tl.constexpr):
    """Return what deviations are measured from: the first value of each channel, or 0 if not finite.

    It takes a large common mean away before anything is rounded.
    """
    value = load(x, at, inside, ACC)
    return tl.where(tl.abs(value) < float("inf"), value, 0)


@triton.jit
def _batch_norm_act_statistics_kernel(
    x, partials, rows, width, pitch, channels, strips, splits, tiles,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write count, mean and sum of squared deviations of each share: Welford's update in every lane."""
    strip, share = place(strips)
    channel = channel_of(strip, LAST, COLS)
    origin = _origin(x, channel if LAST else channel * width, channel < channels, ACC)
    count = tl.zeros((ROWS, COLS), ACC)
    mean = tl.zeros((ROWS, COLS), ACC)
    squares = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, inside, ACC) - origin
        one = inside.to(ACC)
        count += one
        step = tl.where(inside, value - mean, 0)
        mean += divide(step, tl.maximum(count, 1.0))
        squares += step * tl.where(inside, value - mean, 0)
    center = divide(sum_of_channel(count * mean, LAST), sum_of_channel(count, LAST))  # no share is empty
    squares += count * (mean - center) * (mean - center)
    store_sum(partials, 0, count, strip, share, channels, splits, LAST, COLS)
    store_partial(partials, 1, center, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 2, squares, strip, share, channels, splits, LAST, COLS)


@triton.jit(do_not_specialize=["splits"])
def _batch_norm_act_statistics_finish_kernel(
    x, partials, mean, rstd, between, splits, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Combine the shares in one fixed order: the mean first, then the deviations from it.

    ``between`` is the distance from one channel's first value to the next one's.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    channel = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    plane = splits.to(tl.int64) * channels
    count = tl.zeros((ROWS, COLS), ACC)
    total = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, splits, ROWS):
        share = start + tl.arange(0, ROWS).to(tl.int64)
        at = share[:, None] * channels + channel[None, :]
        inside = (share < splits)[:, None] & (channel < channels)[None, :]
        n = tl.load(partials + at, mask=inside, other=0)
        count += n
        total += n * tl.load(partials + plane + at, mask=inside, other=0)
    number = tl.maximum(tl.sum(count, axis=0), 1.0)
    center = divide(tl.sum(total, axis=0), number)
    squares = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, splits, ROWS):
        share = start + tl.arange(0, ROWS).to(tl.int64)
        at = share[:, None] * channels + channel[None, :]
        inside = (share < splits)[:, None] & (channel < channels)[None, :]
        n = tl.load(partials + at, mask=inside, other=0)
        off = tl.where(inside, tl.load(partials + plane + at, mask=inside, other=0) - center[None, :], 0)
        squares += tl.load(partials + 2 * plane + at, mask=inside, other=0) + n * off * off
    variance = divide(tl.sum(squares, axis=0), number)
    origin = _origin(x, channel * between, channel < channels, ACC)
    tl.store(mean + channel, origin + center, mask=channel < channels)
    one = tl.full((COLS,), 1, ACC)
    tl.store(rstd + channel, divide(one, square_root(variance + EPS)), mask=channel < channels)


@triton.jit
def _batch_norm_act_forward_kernel(
    x, weight, bias, mean, rstd, residual, quantizer, y, activated, ends,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    strip, share = place(strips)
    center = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    scale = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    scale *= of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    shift = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    step, zero = _grid_of(quantizer, ACC)
    if ends is not None:
        low, low_count = tl.full((ROWS, COLS), float("inf"), ACC), tl.zeros((ROWS, COLS), ACC)
        high, high_count = tl.full((ROWS, COLS), float("-inf"), ACC), tl.zeros((ROWS, COLS), ACC)
        nans = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        z = _normalised(load(x, at, inside, ACC), center, scale, shift)
        if residual is not None:
            z += load(residual, at, inside, ACC)
        out = narrow(_activated(z, ACTIVATION), y.dtype.element_ty)
        if activated is not None:
            tl.store(activated + at, out, mask=inside)
        if quantizer is not None:
            levels = quantized(widen(out, ACC), step, zero, quantizer[2], quantizer[3])
            out = narrow(levels, y.dtype.element_ty)
        if ends is not None:
            low, low_count, high, high_count, nans = extended(
                widen(out, ACC), inside, low, low_count, high, high_count, nans
            )
        tl.store(y + at, out, mask=inside)
    if ends is not None:
        store_ends(ends, tl.program_id(0), strips * splits, low, low_count, high, high_count, nans)


@triton.jit
def _batch_norm_act_backward_sums_kernel(
    dy, x, activated, weight, bias, mean, rstd, quantizer, ends, d_ends, dresidual, partials,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr, WITH_L1: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    strip, share = place(strips)
    center = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    scale = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    shift = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    step, zero = _grid_of(quantizer, ACC)
    low, high, low_share, high_share = shares_of(ends, d_ends, ACC)
    a = tl.zeros((ROWS, COLS), ACC)
    b = tl.zeros((ROWS, COLS), ACC)
    l1 = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, inside, ACC)
        g = load(dy, at, inside, ACC)
        T: tl.constexpr = x.dtype.element_ty
        if d_ends is not None:
            out = _stored(value, center, scale, shift, activated, at, inside, T, ACTIVATION, ACC)
            g = tl.where(inside, with_share(g, out, low, high, low_share, high_share), 0)
            passes = _slope(out, quantizer, step, zero, inside, ACTIVATION)
        else:
            passes = _passes(
                value, center, scale, shift, activated, quantizer, step, zero, at, inside, T, ACTIVATION, ACC
            )  # fmt: skip
        l1 += tl.abs(g)
        g = tl.where(passes, g, 0)
        if dresidual is not None:
            tl.store(dresidual + at, narrow(g, dresidual.dtype.element_ty), mask=inside)
        a += g
        b += g * ((value - center) * r)
    store_sum(partials, 0, a, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 1, b, strip, share, channels, splits, LAST, COLS)
    if WITH_L1:
        store_sum(partials, 2, l1, strip, share, channels, splits, LAST, COLS)


@triton.jit(do_not_specialize=["count"])
def _batch_norm_act_backward_kernel(
    dy, x, weight, bias, mean, rstd, quantizer, ends, d_ends, dweight, dbias, dx, count,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    strip, share = place(strips)
    center = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    scale = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    shift = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    step, zero = _grid_of(quantizer, ACC)
    low, high, low_share, high_share = shares_of(ends, d_ends, ACC)
    each = divide(tl.full((), 1, ACC), count.to(ACC))
    a = of_channel(dbias, strip, channels, 0, LAST, COLS, ACC) * each
    b = of_channel(dweight, strip, channels, 0, LAST, COLS, ACC) * each
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, inside, ACC)
        g = load(dy, at, inside, ACC)
        T: tl.constexpr = x.dtype.element_ty
        if d_ends is not None:
            out = _stored(value, center, scale, shift, None, at, inside, T, ACTIVATION, ACC)
            g = with_share(g, out, low, high, low_share, high_share)
            passes = _slope(out, quantizer, step, zero, inside, ACTIVATION)
        else:
            passes = _passes(
                value, center, scale, shift, None, quantizer, step, zero, at, inside, T, ACTIVATION, ACC
            )
        g = tl.where(passes, g, 0)
        if TRAINING:
            g -= a + (value - center) * r * b
        tl.store(dx + at, narrow(g * scale, dx.dtype.element_ty), mask=inside)


@triton.jit
def _batch_norm_act_double_backward_sums_kernel(
    d_dx, dy, x, activated, weight, bias, mean, rstd, quantizer, partials,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the shares of A = sum g, B = sum g*xh, P = sum v, Q = sum v*xh, S = sum g*v."""
    strip, share = place(strips)
    center = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    scale = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    shift = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    step, zero = _grid_of(quantizer, ACC)
    a = tl.zeros((ROWS, COLS), ACC)
    b = tl.zeros((ROWS, COLS), ACC)
    p = tl.zeros((ROWS, COLS), ACC)
    q = tl.zeros((ROWS, COLS), ACC)
    s = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, inside, ACC)
        g = load(dy, at, inside, ACC)
        T: tl.constexpr = x.dtype.element_ty
        passes = _passes(
            value, center, scale, shift, activated, quantizer, step, zero, at, inside, T, ACTIVATION, ACC
        )  # fmt: skip
        g = tl.where(passes, g, 0)
        xh = (value - center) * r
        a += g
        b += g * xh
        if d_dx is not None:
            v = load(d_dx, at, inside, ACC)
            p += v
            q += v * xh
            s += g * v
    store_sum(partials, 0, a, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 1, b, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 2, p, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 3, q, strip, share, channels, splits, LAST, COLS)
    store_sum(partials, 4, s, strip, share, channels, splits, LAST, COLS)


@triton.jit(do_not_specialize=["count"])
def _batch_norm_act_double_backward_kernel(
    d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd, quantizer, sums,
    d_dy, d_x, d_weight, count, rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    strip, share = place(strips)
    center = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    scale = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    shift = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    step, zero = _grid_of(quantizer, ACC)
    gw = of_channel(d_dweight, strip, channels, 0, LAST, COLS, ACC)
    gb = of_channel(d_dbias, strip, channels, 0, LAST, COLS, ACC)
    # Sums become means; then d_x = of_xh * xh + of_one + of_g * g + of_v * v.
    each = divide(tl.full((), 1, ACC), count.to(ACC))
    a = of_channel(sums[0], strip, channels, 0, LAST, COLS, ACC) * each
    b = of_channel(sums[1], strip, channels, 0, LAST, COLS, ACC) * each
    p = of_channel(sums[2], strip, channels, 0, LAST, COLS, ACC) * each
    q = of_channel(sums[3], strip, channels, 0, LAST, COLS, ACC) * each
    s = of_channel(sums[4], strip, channels, 0, LAST, COLS, ACC)
    of_g = gw * r
    if TRAINING:
        k = scale * r
        of_xh = k * (a * p - s * each + 3 * b * q) - of_g * b
        of_one = k * (q * a + b * p) - of_g * a
        of_g -= k * q
        of_v = -k * b
        s -= count.to(ACC) * (a * p + b * q)
    if share == 0:
        store_of_channel(d_weight, r * s, strip, channels, LAST, COLS)
    for i in range(tiles):
        at, inside = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, inside, ACC)
        gradient = load(dy, at, inside, ACC)
        T: tl.constexpr = x.dtype.element_ty
        passes = _passes(
            value, center, scale, shift, activated, quantizer, step, zero, at, inside, T, ACTIVATION, ACC
        )  # fmt: skip
        g = tl.where(passes, gradient, 0)
        xh = (value - center) * r
        d_g = gw * xh + gb
        d_value = of_g * g
        if TRAINING:
            d_value += of_xh * xh + of_one
        if d_dx is not None:
            v = load(d_dx, at, inside, ACC)
            if TRAINING:
                d_value += of_v * v
                v -= p + xh * q
            d_g += scale * v
        if d_dresidual is not None:
            d_g += load(d_dresidual, at, inside, ACC)
        d_g = tl.where(passes, d_g, 0)
        if d_l1 is not None:
            d_g += sign(gradient) * tl.load(d_l1).to(ACC)
        tl.store(d_dy + at, narrow(d_g, d_dy.dtype.element_ty), mask=inside)
        tl.store(d_x + at, narrow(d_value, d_x.dtype.element_ty), mask=inside)
