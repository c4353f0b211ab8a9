"""Compare a sweep of the Triton backend with the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends import reference, triton

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The reference sums in another order. Half precision is rounded once, so a tie may fall either way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def both(sweep: str, *args: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the results of the Triton backend beside the reference's, after checking all but the values."""
    before = [a.clone() for a in _tensors(args)]
    ours, truth = (_tensors([getattr(b, sweep)(*args)]) for b in (triton, reference))
    assert all(a.equal(b) or a.isnan().any() for a, b in zip(_tensors(args), before, strict=True)), "changed"
    assert not {a.data_ptr() for a in ours if a.numel()} & {a.data_ptr() for a in _tensors(args)}, "returned"
    for a, b in zip(ours, truth, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    return list(zip(ours, truth, strict=True))


def same_bits(sweep: str, *args: Any) -> None:
    for a, b in both(sweep, *args):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def close(sweep: str, *args: Any, tolerance: float | None = None) -> None:
    """Check each result relative to its largest element; NaN and infinities must be in the same places."""
    for a, b in both(sweep, *args):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        a, b = (t.double().nan_to_num(0, 0, 0) for t in (a, b))
        largest = b.abs().max() if b.numel() else 0
        off = (a - b).abs().max() if b.numel() else 0
        dtype = _dtype(args)
        assert off <= (tolerance or TOLERANCE[dtype]) * largest, f"{sweep}: off by {off} of {largest}"


def _dtype(args: Any) -> torch.dtype:
    return min((t.dtype for t in _tensors(args)), key=lambda d: torch.finfo(d).bits)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
