"""Device functions shared by all kernels: conversions, rounding, sign, and the fixed-order sum.

Every kernel is compiled with ``enable_fp_fusion=False`` (see `_launch.OPTIONS`): a product and a sum
are never fused, so the interpreter, the compiled kernel and two kernels that repeat one formula agree
to the last bit.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x, ACC: tl.constexpr):
    """Return ``x`` in the type of its sums, exactly."""
    # Triton's interpreter truncates to bfloat16 and loses its denormals; the hardware does neither.
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(ACC)
    return wide


@triton.jit
def narrow(x, T: tl.constexpr):
    """Return ``x`` rounded to the nearest value of type ``T``, ties to even."""
    if INTERPRETED and T == tl.bfloat16:  # noqa: SIM300  T is an argument, no constant
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(T)
    return rounded


@triton.jit
def divide(x, y):
    """Return ``x / y``, correctly rounded: in float32 the plain quotient is an approximation."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """Return the square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def round_half_even(x):
    """Return ``x`` rounded to a whole number, ties to even; NaN and infinities stay.

    Above 2^23 (2^52 in float64) there are whole numbers only. Below it, adding that number with the
    sign of ``x`` leaves no bits for a fraction, so the addition itself rounds, half to even as IEEE
    754 says; taking it away again is exact. No compiler may simplify this without fast maths.
    """
    LIMIT: tl.constexpr = 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0
    shift = tl.where(x < 0, -LIMIT, LIMIT).to(x.dtype)
    return tl.where(tl.abs(x) < LIMIT, (x + shift) - shift, x)


@triton.jit
def sign(x):
    """Return -1, 0 or 1; 0 for NaN, as ``torch.sign`` does."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def _sum_of_rows(
    partials, k, rows, columns, column, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the sum over the rows of entry ``k`` of ``partials``, in a fixed order."""
    total = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        at = (k * rows + row)[:, None] * columns + column[None, :]
        in_bounds = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + at, mask=in_bounds, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def finish_kernel(partials, outs, rows, columns, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum ``partials`` of ``(len(outs), rows, columns)`` over its rows, each k into ``outs[k]``."""
    column = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    for k in tl.static_range(len(outs)):
        total = _sum_of_rows(partials, k, rows, columns, column, ACC, ROWS, COLS)
        tl.store(outs[k] + column, total, mask=column < columns)


@triton.jit
def stacked_finish_kernel(
    partials,
    out,
    rows,
    columns,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sum ``partials`` of ``(COUNT, rows, columns)`` over its rows into ``out`` of ``(COUNT, columns)``."""
    column = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    for k in tl.static_range(COUNT):
        total = _sum_of_rows(partials, k, rows, columns, column, ACC, ROWS, COLS)
        tl.store(out + (k * columns + column), total, mask=column < columns)
