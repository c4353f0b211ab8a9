"""The kernels of `batch_norm_act`; docs/mathematics.md has the derivation, `_tiles` the walk over memory.

The names are those of the derivation, "Batch norm, in training": ``r = 1 / std``, ``xh = (x - mu) * r``,
``g = mask * dy``, ``v = d_dx``, M values of each channel, and the sums A, B, P, Q, S.

``quantizer`` is None or ``(scale, zero_point, q_min, q_max)``; the codes are floating-point, so one kernel
serves every bit width. ``ends`` is None or, in the forward kernel, memory for the extremes of y and, in the
backward kernels, those extremes with their gradients ``d_ends``.
"""

import triton
import triton.language as tl

from gradl1_fast.backends.triton._device import divide, narrow, sign, square_root, widen
from gradl1_fast.backends.triton._ends import extended, shares_of, store_ends, with_share
from gradl1_fast.backends.triton._quantizer import mask_of_codes, quantized
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
def _normalised(x, mu, gamma_r, beta):
    """Return ``(x - mu) * gamma_r + beta``: the formula of the forward pass and of every mask."""
    return (x - mu) * gamma_r + beta


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """Return ``act(z)``; NaN stays NaN."""
    if ACTIVATION != "none":
        z = tl.where(z <= 0, 0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z >= 6, 6, z)
    return z


@triton.jit
def _qparams_of(quantizer, ACC: tl.constexpr):
    """Return the quantizer's scale and zero point, loaded once for all tiles, if there is one."""
    if quantizer is None:
        s, z = tl.full((), 1, ACC), tl.full((), 0, ACC)
    else:
        s, z = tl.load(quantizer[0]).to(ACC), tl.load(quantizer[1]).to(ACC)
    return s, z


@triton.jit
def _stored(
    x, mu, gamma_r, beta, activated, at, in_bounds,
    T: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the output of the activation as stored, rounded to its type: loaded or recomputed."""
    if activated is None:
        out = widen(narrow(_activated(_normalised(x, mu, gamma_r, beta), ACTIVATION), T), ACC)
    else:
        out = load(activated, at, in_bounds, ACC)
    return out


@triton.jit
def _mask_of(out, quantizer, s, z, in_bounds, ACTIVATION: tl.constexpr):
    """Return the mask from the output of the activation: slope 1, and a code that is not clamped."""
    mask = in_bounds
    if ACTIVATION == "relu":
        mask = (out <= 0) == 0  # as PyTorch's threshold does: NaN passes
    if ACTIVATION == "relu6":
        mask = (out > 0) & (out < 6)
    if quantizer is not None:
        mask &= mask_of_codes(out, s, z, quantizer[2], quantizer[3])
    return mask


@triton.jit
def _mask(
    x, mu, gamma_r, beta, activated, quantizer, s, z, at, in_bounds,
    T: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the mask: the activation has slope 1, and the code, if any, is not clamped.

    It follows from ``activated`` if given, else from the forward's own arithmetic: the output of the
    activation is recomputed as it was stored, rounded to its type, so that both ways agree.
    """
    mask = in_bounds
    if ACTIVATION != "none" or quantizer is not None:
        out = _stored(x, mu, gamma_r, beta, activated, at, in_bounds, T, ACTIVATION, ACC)
        mask = _mask_of(out, quantizer, s, z, in_bounds, ACTIVATION)
    return mask


@triton.jit
def _origin(x, at, in_bounds, ACC: tl.constexpr):
    """Return the shift of deviations: the first value of each channel, or 0 if it is not finite.

    It takes a large common mean away before anything is rounded.
    """
    value = load(x, at, in_bounds, ACC)
    return tl.where(tl.abs(value) < float("inf"), value, 0)


@triton.jit
def _batch_norm_act_statistics_kernel(
    x, partials, rows, width, pitch, channels, strips, splits, tiles,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write count, mean and sum of squared deviations per share, by Welford's update in each lane."""
    # Phase 1: deviations are measured from the first value of each channel.
    strip, share = place(strips)
    channel = channel_of(strip, LAST, COLS)
    origin = _origin(x, channel if LAST else channel * width, channel < channels, ACC)
    count = tl.zeros((ROWS, COLS), ACC)
    mean = tl.zeros((ROWS, COLS), ACC)
    squares = tl.zeros((ROWS, COLS), ACC)
    # Phase 2: the mean and the squared deviations of each lane.
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        value = load(x, at, in_bounds, ACC) - origin
        one = in_bounds.to(ACC)
        count += one
        delta = tl.where(in_bounds, value - mean, 0)
        mean += divide(delta, tl.maximum(count, 1.0))
        squares += delta * tl.where(in_bounds, value - mean, 0)
    # Phase 3: those of the share, from its lanes.
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
    """Combine the shares in a fixed order: first the mean, then the deviations from it.

    ``between`` is the distance from one channel's first value to the next one's.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    channel = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    plane = splits.to(tl.int64) * channels
    # Phase 1: the mean of each channel.
    count = tl.zeros((ROWS, COLS), ACC)
    total = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, splits, ROWS):
        share = start + tl.arange(0, ROWS).to(tl.int64)
        at = share[:, None] * channels + channel[None, :]
        in_bounds = (share < splits)[:, None] & (channel < channels)[None, :]
        n = tl.load(partials + at, mask=in_bounds, other=0)
        count += n
        total += n * tl.load(partials + plane + at, mask=in_bounds, other=0)
    number = tl.maximum(tl.sum(count, axis=0), 1.0)
    center = divide(tl.sum(total, axis=0), number)
    # Phase 2: the squared deviations from it: those within a share, and that of the share's mean.
    squares = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, splits, ROWS):
        share = start + tl.arange(0, ROWS).to(tl.int64)
        at = share[:, None] * channels + channel[None, :]
        in_bounds = (share < splits)[:, None] & (channel < channels)[None, :]
        n = tl.load(partials + at, mask=in_bounds, other=0)
        share_mean = tl.load(partials + plane + at, mask=in_bounds, other=0)
        off = tl.where(in_bounds, share_mean - center[None, :], 0)
        squares += tl.load(partials + 2 * plane + at, mask=in_bounds, other=0) + n * off * off
    # Phase 3: mean and 1/std.
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
    # Phase 1: what belongs to the channels of this program, and the quantizer.
    strip, share = place(strips)
    mu = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    gamma_r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    gamma_r *= of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    beta = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    s, z = _qparams_of(quantizer, ACC)
    if ends is not None:
        low, low_count = tl.full((ROWS, COLS), float("inf"), ACC), tl.zeros((ROWS, COLS), ACC)
        high, high_count = tl.full((ROWS, COLS), float("-inf"), ACC), tl.zeros((ROWS, COLS), ACC)
        nans = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        # Phase 2: normalise, add, activate.
        pre = _normalised(load(x, at, in_bounds, ACC), mu, gamma_r, beta)
        if residual is not None:
            pre += load(residual, at, in_bounds, ACC)
        out = narrow(_activated(pre, ACTIVATION), y.dtype.element_ty)
        if activated is not None:
            tl.store(activated + at, out, mask=in_bounds)
        # Phase 3: quantize or measure what is stored.
        if quantizer is not None:
            levels = quantized(widen(out, ACC), s, z, quantizer[2], quantizer[3])
            out = narrow(levels, y.dtype.element_ty)
        if ends is not None:
            low, low_count, high, high_count, nans = extended(
                widen(out, ACC), in_bounds, low, low_count, high, high_count, nans
            )
        tl.store(y + at, out, mask=in_bounds)
    if ends is not None:
        store_ends(ends, tl.program_id(0), strips * splits, low, low_count, high, high_count, nans)


@triton.jit
def _batch_norm_act_backward_sums_kernel(
    dy, x, activated, weight, bias, mean, rstd, quantizer, ends, d_ends, dresidual, partials,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr, WITH_L1: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the shares of A = sum g, B = sum g*xh and l1 = sum |dy|, and g if a residual needs it."""
    # Phase 1: what belongs to the channels of this program, and the quantizer.
    strip, share = place(strips)
    mu = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    gamma_r = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    beta = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    s, z = _qparams_of(quantizer, ACC)
    low, high, low_share, high_share = shares_of(ends, d_ends, ACC)
    a = tl.zeros((ROWS, COLS), ACC)
    b = tl.zeros((ROWS, COLS), ACC)
    l1 = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        # Phase 2: g = mask * dy, where dy has its share of the gradient of the ends.
        value = load(x, at, in_bounds, ACC)
        g = load(dy, at, in_bounds, ACC)
        T: tl.constexpr = x.dtype.element_ty
        if d_ends is not None:
            out = _stored(value, mu, gamma_r, beta, activated, at, in_bounds, T, ACTIVATION, ACC)
            g = tl.where(in_bounds, with_share(g, out, low, high, low_share, high_share), 0)
            mask = _mask_of(out, quantizer, s, z, in_bounds, ACTIVATION)
        else:
            mask = _mask(
                value, mu, gamma_r, beta, activated, quantizer, s, z, at, in_bounds, T, ACTIVATION, ACC
            )
        l1 += tl.abs(g)
        g = tl.where(mask, g, 0)
        if dresidual is not None:
            tl.store(dresidual + at, narrow(g, dresidual.dtype.element_ty), mask=in_bounds)
        # Phase 3: add up.
        a += g
        b += g * ((value - mu) * r)
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
    """Write dx = gamma*r * (g - A/M - xh*B/M); in evaluation gamma*r * g."""
    # Phase 1: what belongs to the channels of this program, and the quantizer.
    strip, share = place(strips)
    mu = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    gamma_r = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    beta = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    s, z = _qparams_of(quantizer, ACC)
    low, high, low_share, high_share = shares_of(ends, d_ends, ACC)
    one_over_m = divide(tl.full((), 1, ACC), count.to(ACC))
    a_over_m = of_channel(dbias, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    b_over_m = of_channel(dweight, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        # Phase 2: g = mask * dy.
        value = load(x, at, in_bounds, ACC)
        g = load(dy, at, in_bounds, ACC)
        T: tl.constexpr = x.dtype.element_ty
        if d_ends is not None:
            out = _stored(value, mu, gamma_r, beta, None, at, in_bounds, T, ACTIVATION, ACC)
            g = with_share(g, out, low, high, low_share, high_share)
            mask = _mask_of(out, quantizer, s, z, in_bounds, ACTIVATION)
        else:
            mask = _mask(value, mu, gamma_r, beta, None, quantizer, s, z, at, in_bounds, T, ACTIVATION, ACC)
        g = tl.where(mask, g, 0)
        # Phase 3: dx.
        if TRAINING:
            g -= a_over_m + (value - mu) * r * b_over_m
        tl.store(dx + at, narrow(g * gamma_r, dx.dtype.element_ty), mask=in_bounds)


@triton.jit
def _batch_norm_act_double_backward_sums_kernel(
    d_dx, dy, x, activated, weight, bias, mean, rstd, quantizer, partials,
    rows, width, pitch, channels, strips, splits, tiles,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the shares of A = sum g, B = sum g*xh, P = sum v, Q = sum v*xh, S = sum g*v."""
    # Phase 1: what belongs to the channels of this program, and the quantizer.
    strip, share = place(strips)
    mu = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    gamma_r = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    beta = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    qs, qz = _qparams_of(quantizer, ACC)
    a = tl.zeros((ROWS, COLS), ACC)
    b = tl.zeros((ROWS, COLS), ACC)
    p = tl.zeros((ROWS, COLS), ACC)
    q = tl.zeros((ROWS, COLS), ACC)
    s = tl.zeros((ROWS, COLS), ACC)
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        # Phase 2: g = mask * dy and xh.
        value = load(x, at, in_bounds, ACC)
        g = load(dy, at, in_bounds, ACC)
        T: tl.constexpr = x.dtype.element_ty
        mask = _mask(
            value, mu, gamma_r, beta, activated, quantizer, qs, qz, at, in_bounds, T, ACTIVATION, ACC
        )
        g = tl.where(mask, g, 0)
        xh = (value - mu) * r
        # Phase 3: add up.
        a += g
        b += g * xh
        if d_dx is not None:
            v = load(d_dx, at, in_bounds, ACC)
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
    """Write d_dy, d_x and d_weight.

    d_dy = mask * (gamma*r * (v - P/M - xh*Q/M) + G_gamma*xh + G_beta + d_dresidual) + d_l1 * sign(dy)
    d_x = gamma*r^2/M * (xh * (A*P/M - S + 3*B*Q/M) + Q * (A/M - g) + B * (P/M - v))
          + G_gamma*r * (g - A/M - xh*B/M)
    d_weight = r * (S - A*P/M - B*Q/M)

    In evaluation the terms with M vanish.
    """
    # Phase 1: what belongs to the channels of this program, and the quantizer.
    strip, share = place(strips)
    mu = of_channel(mean, strip, channels, 0, LAST, COLS, ACC)
    r = of_channel(rstd, strip, channels, 0, LAST, COLS, ACC)
    gamma_r = r * of_channel(weight, strip, channels, 1, LAST, COLS, ACC)
    beta = of_channel(bias, strip, channels, 0, LAST, COLS, ACC)
    qs, qz = _qparams_of(quantizer, ACC)
    g_gamma = of_channel(d_dweight, strip, channels, 0, LAST, COLS, ACC)
    g_beta = of_channel(d_dbias, strip, channels, 0, LAST, COLS, ACC)
    # Phase 2: d_weight, and the coefficients in d_x = of_xh * xh + of_one + of_g * g + of_v * v.
    m = count.to(ACC)
    one_over_m = divide(tl.full((), 1, ACC), m)
    row = tl.full((), 1, tl.int64) * channels  # of sums, which is (5, channels)
    a_over_m = of_channel(sums, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    b_over_m = of_channel(sums + row, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    p_over_m = of_channel(sums + 2 * row, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    q_over_m = of_channel(sums + 3 * row, strip, channels, 0, LAST, COLS, ACC) * one_over_m
    s = of_channel(sums + 4 * row, strip, channels, 0, LAST, COLS, ACC)
    of_g = g_gamma * r
    if TRAINING:
        gamma_r2 = gamma_r * r
        of_xh = gamma_r2 * (a_over_m * p_over_m - s * one_over_m + 3 * b_over_m * q_over_m) - of_g * b_over_m
        of_one = gamma_r2 * (q_over_m * a_over_m + b_over_m * p_over_m) - of_g * a_over_m
        of_g -= gamma_r2 * q_over_m
        of_v = -gamma_r2 * b_over_m
        s -= m * (a_over_m * p_over_m + b_over_m * q_over_m)
    if share == 0:
        store_of_channel(d_weight, r * s, strip, channels, LAST, COLS)
    for i in range(tiles):
        at, in_bounds = tile(strip, share * tiles + i, rows, width, pitch, LAST, ROWS, COLS)
        # Phase 3: g = mask * dy and xh.
        value = load(x, at, in_bounds, ACC)
        gradient = load(dy, at, in_bounds, ACC)
        T: tl.constexpr = x.dtype.element_ty
        mask = _mask(
            value, mu, gamma_r, beta, activated, quantizer, qs, qz, at, in_bounds, T, ACTIVATION, ACC
        )
        g = tl.where(mask, gradient, 0)
        xh = (value - mu) * r
        # Phase 4: d_x, and d_dy before and after the mask.
        d_g = g_gamma * xh + g_beta
        d_value = of_g * g
        if TRAINING:
            d_value += of_xh * xh + of_one
        if d_dx is not None:
            v = load(d_dx, at, in_bounds, ACC)
            if TRAINING:
                d_value += of_v * v
                v -= p_over_m + xh * q_over_m
            d_g += gamma_r * v
        if d_dresidual is not None:
            d_g += load(d_dresidual, at, in_bounds, ACC)
        d_g = tl.where(mask, d_g, 0)
        if d_l1 is not None:
            d_g += sign(gradient) * tl.load(d_l1).to(ACC)
        tl.store(d_dy + at, narrow(d_g, d_dy.dtype.element_ty), mask=in_bounds)
        tl.store(d_x + at, narrow(d_value, d_x.dtype.element_ty), mask=in_bounds)
