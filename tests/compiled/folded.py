"""Fake quantization folded into batch norm, against the same backend's two operations one after the other.

The backend's own float sweeps and its fake quantization are compared with the reference elsewhere. Here the
codes, the masks and the sums must be theirs to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tests.compiled.calls import ACTIVATIONS, Layout, sums

KINDS = list(itertools.product((True, False), ACTIVATIONS, (False, True)))
GRIDS = ((0.23, 5.0), (0.5, 0.0))  # scale and zero point


def assert_folds(
    sweeps: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    device: torch.device | str = "cpu",
    kinds: Sequence[tuple[bool, str, bool]] = KINDS,
) -> None:
    """Check the sweeps in training and evaluation, with every activation, with and without a residual.

    In evaluation the input holds NaN and infinities. Weight and bias, and some of the cotangents, are
    absent now and then.
    """
    x, residual, dy, v, u = ((2 * torch.randn(shape)).to(dtype) for _ in range(5))
    x[-1, 0, ..., 0] = 9  # so that relu6 reaches its upper end
    special = x.clone()
    special[0, 0, ..., 0], special[0, 1, ..., 1], special[-1, 1, ..., -1] = map(float, ("nan", "inf", "-inf"))
    finite, special, residual, dy, v, u = (layout(t).to(device) for t in (x, special, residual, dy, v, u))
    w, b, mean, var, gw, gb = ((torch.rand(shape[1]) + 0.5).to(device, sums(dtype)) for _ in range(6))
    d_l1 = torch.tensor(-0.7, dtype=sums(dtype), device=device)
    plain_w = w
    for i, (training, act, added) in enumerate(kinds):
        # Of relu6 both ends lie within the grid, of the others the grid cuts off both tails.
        grid = GRIDS[act == "relu6"]
        grid = (*(torch.tensor(t, dtype=sums(dtype), device=device) for t in grid), 0, 15)
        w, b = (None, None) if i % 4 == 3 else (plain_w * (4 if act == "relu6" else 1), plain_w - 1)
        r, open_ = residual if added else None, act == "none"
        name = f"{shape}, {dtype}, {training=}, {act}, {added=}"
        x = finite if training else special  # in training one of these fills its channel
        head = (x, w, b, mean, var, r)
        a, _, m, rstd = sweeps.batch_norm_act_forward(*head, None, None, 0, 0, training, 1e-5, act)
        y, kept, *statistics = sweeps.batch_norm_act_forward(*head, *grid, training, 1e-5, act)
        expected = sweeps.fake_quantize_forward(a, *grid, None)
        levels = expected[expected.isfinite()].unique()
        assert 2 < len(levels) <= 16
        assert act != "relu6" or (a == 6).any() or w is None, name
        _equal((y, *statistics), (expected, m, rstd), name)
        _equal((kept,), (a if added else a.new_empty((0,)),), name)

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
        for d_dx, d_dw, d_db, d_r, d_norm in (
            (v, gw, gb, d_dr, d_l1),
            (v, None, None, None, None),
            (None, gw, None, None, d_l1),
        ):
            d_dy, d_x, d_w = sweeps.batch_norm_act_double_backward(d_dx, d_dw, d_db, d_r, d_norm, dy, *saved)
            to_activation = None if open_ else d_r
            d_g, *expected = sweeps.batch_norm_act_double_backward(
                d_dx, d_dw, d_db, to_activation, None, g, *plain
            )
            d_g = d_g if d_r is to_activation else d_g + d_r
            _equal((d_x, d_w), expected, name)
            expected = sweeps.fake_quantize_double_backward(d_g, d_norm, dy, a, *grid, None)
            # One rounding less than in two operations: to the type of the tensor, in between.
            eps = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(d_dy, expected, rtol=eps, atol=eps, equal_nan=True)


def _equal(actual: Any, expected: Any, name: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype, f"{name}, {i}"
        assert a.stride() == e.stride(), f"{name}, {i}"
        torch.testing.assert_close(
            a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{name}, {i}: {m}"
        )
