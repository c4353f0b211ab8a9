"""torch.library.opcheck on every registered operator: schema, fakes, autograd, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gradl1_fast.ops.tap import tap_backward
from tests.full import FULL
from tests.ops.layouts import channels_last, transposed
from tests.ops.sweeps import leaf

Call = tuple[str, tuple[Any, ...]]
Arguments = Callable[[], Iterator[Call]]
_ops = torch.ops.gradl1_fast


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def tap() -> Iterator[Call]:
    for layout in (torch.clone, transposed, channels_last):
        x, dy = leaf(layout(values(2, 3, 4, 5))), layout(values(2, 3, 4, 5))
        yield "tap_forward", (x, leaf(torch.zeros(())))
        yield "tap_alias", (x, leaf(torch.zeros(())))
        yield "tap_backward", (leaf(dy),)
        yield "tap_double_backward", (dy, torch.ones(()), dy)
    yield "tap_double_backward", (None, torch.ones(()), dy)
    yield "tap_double_backward", (dy, None, dy)


def fake_quantize() -> Iterator[Call]:
    for layout in (torch.clone, transposed):
        for axis, channels, dtype in ((None, (), torch.float32), (1, (3,), torch.bfloat16)):
            x, dy = leaf(layout(values(2, 3, 4, dtype=dtype))), values(2, 3, 4, dtype=dtype)
            grid = (torch.full(channels, 0.5), torch.zeros(channels), -3, 3, axis)
            yield "fake_quantize_forward", (x, *grid, None)
            yield "fake_quantize_forward", (x, *grid, leaf(torch.zeros(())))
            yield "fake_quantize_backward", (leaf(dy), x, *grid, True)
            yield "fake_quantize_backward", (leaf(dy), x, *grid, False)
            for d_dx, d_l1 in ((dy, torch.ones(())), (None, torch.ones(())), (dy, None)):
                yield "fake_quantize_double_backward", (d_dx, d_l1, dy, x.detach(), *grid)


def l1_norm() -> Iterator[Call]:
    for tensors in (
        [values(3, 4)],
        [values(3, 4).t(), values(5, dtype=torch.float64), values(2, dtype=torch.bfloat16), values()],
    ):
        count = values(len(tensors), dtype=torch.float64 if len(tensors) > 1 else torch.float32)
        yield "l1_norm_forward", ([leaf(t) for t in tensors],)
        yield "l1_norm_backward", (leaf(count), tensors)
        yield "l1_norm_double_backward", (tensors, tensors)


def conv() -> Iterator[Call]:
    kinds = ((torch.clone, 1, 1), (channels_last, 2, 1), (torch.clone, 2, 4), (torch.clone, 3, 2))
    for layout, n, groups in kinds:
        x, w = layout(values(2, 4, *[5] * n)), layout(values(4, 4 // groups, *[3] * n))
        geometry = ([2] * n, [1] * n, [1] * n, groups)
        dy = torch.empty_like(_ops.conv_forward(x, w, None, *geometry)).normal_()
        yield "conv_forward", (leaf(x), leaf(w), leaf(values(4)) if groups == 1 else None, *geometry)
        for mask in ([True, True], [True, False], [False, True]):
            yield "conv_backward", (leaf(dy), leaf(x), leaf(w), *geometry, mask)
        for v, u in ((x, w), (None, w), (x, None)):
            yield (
                "conv_double_backward",
                (v, u, dy, x, w, *geometry, [True, u is not None, v is not None]),
            )


def conv_transpose() -> Iterator[Call]:
    kinds = ((torch.clone, 1, 1), (channels_last, 2, 1), (torch.clone, 2, 4), (torch.clone, 3, 2))
    for layout, n, groups in kinds:
        x, w = layout(values(2, 4, *[3] * n)), layout(values(4, 4 // groups, *[3] * n))
        geometry = ([2] * n, [1] * n, [1] * n, [1] * n, groups)
        dy = torch.empty_like(_ops.conv_transpose_forward(x, w, None, *geometry)).normal_()
        bias = leaf(values(4)) if groups == 1 else None
        yield "conv_transpose_forward", (leaf(x), leaf(w), bias, *geometry)
        for mask in ([True, True], [True, False], [False, True]):
            yield "conv_transpose_backward", (leaf(dy), leaf(x), leaf(w), *geometry, mask)
        for v, u in ((x, w), (None, w), (x, None)):
            wanted = [True, u is not None, v is not None]
            yield "conv_transpose_double_backward", (v, u, dy, x, w, *geometry, wanted)


def linear() -> Iterator[Call]:
    for layout in (torch.clone, transposed):
        x, w, dy = layout(values(6, 5)), layout(values(3, 5)), layout(values(6, 3))
        yield "linear_forward", (leaf(x), leaf(w), leaf(values(3)))
        yield "linear_forward", (leaf(values(2, 6, 5)), leaf(w), None)
        for mask in ([True, True], [True, False], [False, True]):
            yield "linear_backward", (leaf(dy), leaf(x), leaf(w), mask)
        for v, u in ((x, w), (None, w), (x, None)):
            yield "linear_double_backward", (v, u, dy, x, w, [True, u is not None, v is not None])


def batch_norm_act() -> Iterator[Call]:
    for layout, dtype in ((torch.clone, torch.float32), (channels_last, torch.bfloat16)):
        x, dy, residual = (layout(values(3, 4, 2, 5, dtype=dtype)) for _ in range(3))
        weight, bias, mean = values(4), values(4), values(4)
        rstd, l1 = mean.abs() + 0.5, torch.ones(())
        grid, no_grid = (l1 / 4, l1, 0, 7), (None, None, 0, 0)
        for activation, training, g in (
            ("relu", True, no_grid),
            ("relu6", False, grid),
            ("none", True, no_grid),
            ("none", True, grid),
        ):
            statistics = (None, None) if training else (mean, rstd)
            x_, w_, b_, r_ = (leaf(t) for t in (x, weight, bias, residual))
            yield (
                "batch_norm_act_forward",
                (x_, w_, b_, *statistics, r_, *g, training, 1e-5, activation, leaf(l1 * 0)),
            )
            yield (
                "batch_norm_act_forward",
                (x_, None, None, *statistics, None, *g, training, 1e-5, activation, None),
            )
            y = None if activation == "none" and g is no_grid else residual
            saved = (y, weight, bias, mean, rstd, *g, training, activation)
            yield "batch_norm_act_backward", (leaf(dy), x_, *saved, True, True)
            yield "batch_norm_act_backward", (leaf(dy), x_, *saved, False, False)
            d_dresidual = residual if y is not None else None
            yield "batch_norm_act_double_backward", (x, mean, mean, d_dresidual, l1, dy, x, *saved, True)
            yield "batch_norm_act_double_backward", (x, None, None, None, None, dy, x, *saved, False)
            yield "batch_norm_act_double_backward", (None, mean, None, None, None, dy, x, *saved, True)


SETS = [tap, fake_quantize, l1_norm, conv, conv_transpose, linear, batch_norm_act]


@pytest.mark.parametrize("arguments", SETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sweep", ["forward", "backward", "double_backward"])
def test_opcheck(arguments: Arguments, sweep: str) -> None:
    sets = [args for name, args in arguments() if name == f"{arguments.__name__}_{sweep}"]
    assert sets
    for args in sets if FULL else sets[::2]:
        torch.library.opcheck(getattr(_ops, f"{arguments.__name__}_{sweep}").default, args)


def test_opcheck_tap_alias() -> None:
    for args in (args for name, args in tap() if name == "tap_alias"):
        torch.library.opcheck(_ops.tap_alias.default, args)


def test_opcheck_scale_probe() -> None:
    torch.library.opcheck(_ops.scale_probe.default, (leaf(torch.zeros(())), torch.ones(())))


def test_an_ordinary_call_does_not_go_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched = []

    def overload(x: Tensor) -> Tensor:
        dispatched.append(x)
        return x.abs().sum()

    monkeypatch.setattr(tap_backward, "_overload", overload)
    x = values(3)
    assert tap_backward(x) == x.abs().sum()
    assert not dispatched
    torch.vmap(tap_backward)(x.expand(2, 3))
    assert dispatched
