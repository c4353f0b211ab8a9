"""Fake quantization folded into batch norm, against the same backend's two operations one after the other.

The backend's own float sweeps and its fake quantization are compared with the reference elsewhere. Here the
codes, the masks and the sums must be theirs to the last bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.compiled.calls import ACTIVATIONS, Layout, sums

KINDS = list(itertools.product((True, False), ACTIVATIONS, (False, True)))


def assert_folds(
    sweeps: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    device: torch.device | str = "cpu",
) -> None:
    """Check the sweeps in training and evaluation, with every activation, with and without a residual."""
    x, residual, dy, v, u = (layout((2 * torch.randn(shape)).to(dtype)).to(device) for _ in range(5))
    w, b, mean, var, gw, gb = ((torch.rand(shape[1]) + 0.5).to(device, sums(dtype)) for _ in range(6))
    scale, zero, d_l1 = (torch.tensor(t, dtype=sums(dtype), device=device) for t in (0.23, 5.0, -0.7))
    grid = (scale, zero, 0, 15)
    for training, act, added in KINDS:
        r, open_ = residual if added else None, act == "none"
        name = f"{shape}, {dtype}, {training=}, {act}, {added=}"
        head = (x, w, b, mean, var, r)
        a, _, m, rstd = sweeps.batch_norm_act_forward(*head, None, None, 0, 0, training, 1e-5, act)
        y, kept, *statistics = sweeps.batch_norm_act_forward(*head, *grid, training, 1e-5, act)
        expected = sweeps.fake_quantize_forward(a, *grid, None)
        assert 2 < len(expected.unique()) <= 16
        _equal((y, *statistics), (expected, m, rstd), name)
        assert torch.equal(kept, a) if added else kept.shape == (0,), name

        saved = (x, kept if added else None, w, b, m, rstd, *grid, training, act, added)
        dx, dw, db, dr, l1 = sweeps.batch_norm_act_backward(dy, *saved, True)
        g, l1_alone = sweeps.fake_quantize_backward(dy, a, *grid, None, True)
        plain = (x, None if open_ else a, w, b, m, rstd, None, None, 0, 0, training, act, added)
        alone = sweeps.batch_norm_act_backward(g, *plain, False)
        _equal((dx, dw, db), alone[:3], name)
        torch.testing.assert_close(l1, l1_alone, rtol=1e-6, atol=0)
        if added:
            _equal((dr,), (g if open_ else alone[3],), name)

        d_dr = u if added else None
        d_dy, d_x, d_w = sweeps.batch_norm_act_double_backward(v, gw, gb, d_dr, d_l1, dy, *saved)
        d_g, *expected = sweeps.batch_norm_act_double_backward(
            v, gw, gb, None if open_ else d_dr, None, g, *plain
        )
        d_g = d_g + u if added and open_ else d_g
        _equal((d_x, d_w), expected, name)
        expected = sweeps.fake_quantize_double_backward(d_g, d_l1, dy, a, *grid, None)
        # One rounding less than in two operations: to the type of the tensor, in between.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(d_dy, expected, rtol=4 * eps, atol=4 * eps)


def _equal(actual: Any, expected: Any, name: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype, f"{name}, {i}"
        assert a.stride() == e.stride(), f"{name}, {i}"
        assert torch.equal(a, e), f"{name}, result {i}: off by {(a.double() - e.double()).abs().max():.3g}"
