"""Calls of the raw sweeps with random arguments, as data: what each backend must agree on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, tuple[Any, ...]]
Layout = Callable[[Tensor], Tensor]

ACTIVATIONS = ("none", "relu", "relu6")
NO_GRID = (None, None, 0, 0)
SHAPES = [(4, 19, 7, 5), (33, 17, 9, 16), (2, 300, 5, 5), (3, 1, 4, 4), (6, 3), (2, 5, 3, 2, 4), (4, 530, 2)]


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_norm_act(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Iterator[Call]:
    """Every sweep in training and evaluation, with every activation, with and without a residual."""
    x, residual, dy, v, u = ((2 * torch.randn(shape) + 0.3).to(dtype) for _ in range(5))
    residual, dy, v, u = (layout(t) for t in (residual, dy, v, u))
    if (
        layout(x).float().transpose(0, 1).flatten(1).var(1).min() > 1e-3
    ):  # else 1/std amplifies rounding noise
        x = layout(x)
    w, b, mean, var, gw, gb = (torch.rand(shape[1]).to(sums(dtype)) + 0.5 for _ in range(6))
    c, b = torch.tensor(0.7, dtype=sums(dtype)), b - 1
    for training, act, added in itertools.product((True, False), ACTIVATIONS, (False, True)):
        head = (x, w, b, mean, var, residual if added else None)
        yield "batch_norm_act_forward", (*head, *NO_GRID, training, 1e-5, act)
        y, _, m, rstd = _forward(*head, *NO_GRID, training, 1e-5, act)
        options = (*NO_GRID, training, act, added)
        yield "batch_norm_act_backward", (dy, x, y, w, b, m, rstd, *options, True)
        masked = u if added and act != "none" else None
        saved = (dy, x, y, w, b, m, rstd, *options)
        yield "batch_norm_act_double_backward", (v, gw, gb, masked, c, *saved)
    yield "batch_norm_act_backward", (dy, x, None, None, None, m, rstd, *NO_GRID, True, "none", False, False)
    yield "batch_norm_act_double_backward", (v, *[None] * 4, dy, x, y, None, None, m, rstd, *options)
    yield "batch_norm_act_double_backward", (None, gw, *[None] * 3, dy, x, y, w, b, m, rstd, *options)


def _forward(*arguments: Any) -> Any:
    from gradl1_fast.backends import reference

    return reference.batch_norm_act_forward(*arguments)


def fake_quantize(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Iterator[Call]:
    """Every sweep with one grid for the tensor, and with one for each index of each axis."""
    x, dy, v = (layout(torch.randn(shape).to(dtype)) for _ in range(3))
    c = torch.tensor(-0.3, dtype=sums(dtype))
    for axis in (None, *range(len(shape))):
        count = 1 if axis is None else shape[axis]
        scale = (0.02 + 0.1 * torch.rand(count)).to(sums(dtype))
        zero = torch.randint(0, 15, (count,)).to(sums(dtype))
        grid = (scale, zero, 0, 15, axis)
        yield "fake_quantize_forward", (x, *grid)
        for with_l1 in (True, False):
            yield "fake_quantize_backward", (dy, x, *grid, with_l1)
        for a, b in ((v, c), (v, None), (None, c)):
            yield "fake_quantize_double_backward", (a, b, dy, x, *grid)


def tap(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Iterator[Call]:
    """Both sweeps, with each of the cotangents missing in turn."""
    dy, v = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
    c = torch.tensor(-0.3, dtype=sums(dtype))
    yield "tap_backward", (dy,)
    for a, b in ((v, c), (v, None), (None, c)):
        yield "tap_double_backward", (a, b, dy)


def l1_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> Iterator[Call]:
    """Several tensors at once: of one type, of mixed types, an empty one among them."""
    x, v = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
    tensors = [x, torch.randn(7), torch.empty(0, dtype=dtype), torch.randn(()), torch.randn(3, 5).half()]
    paired = [v, *(torch.randn_like(t) for t in tensors[1:])]
    yield "l1_norm_forward", (tensors,)
    yield "l1_norm_backward", (torch.randn(5, dtype=sums(dtype)), tensors)
    yield "l1_norm_double_backward", (paired, tensors)


OPERATIONS = [tap, fake_quantize, l1_norm, batch_norm_act]
