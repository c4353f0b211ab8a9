"""The arithmetic of fake quantization, bit for bit that of the reference; values are in the type of sums."""

import triton
import triton.language as tl

from gradl1_fast.backends.triton._device import divide, round_half_even


@triton.jit
def codes(x, s, z):
    """Return the codes of ``x`` before they are clamped."""
    return round_half_even(divide(x, s)) + z


@triton.jit
def within(x, s, z, q_min, q_max):
    """Return where the code of ``x`` is not clamped."""
    found = codes(x, s, z)
    return (found >= q_min) & (found <= q_max)


@triton.jit
def quantized(x, s, z, q_min, q_max):
    """Return ``x`` on the grid; NaN stays NaN, as comparisons keep it where minimum and maximum might not."""
    found = codes(x, s, z)
    found = tl.where(found < q_min, q_min, found)
    found = tl.where(found > q_max, q_max, found)
    return (found - z) * s
