"""The arithmetic of fake quantization, bit for bit that of the reference; values are in the type of sums."""

import triton
import triton.language as tl

from gradl1_fast.backends.triton._device import divide, round_half_even


@triton.jit
def codes(x, s, z):
    """Return the codes of ``x`` before they are clamped."""
    return round_half_even(divide(x, s)) + z


@triton.jit
def mask_of_codes(x, s, z, q_min, q_max):
    """Return the mask: where the code of ``x`` is not clamped."""
    code = codes(x, s, z)
    return (code >= q_min) & (code <= q_max)


@triton.jit
def quantized(x, s, z, q_min, q_max):
    """Return ``s * (clamp(code) - z)``; comparisons keep NaN where minimum and maximum might not."""
    code = codes(x, s, z)
    code = tl.where(code < q_min, q_min, code)
    code = tl.where(code > q_max, q_max, code)
    return (code - z) * s
