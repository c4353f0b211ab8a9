"""The reference returns none of its arguments and changes none, for every pass, type and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradl1_fast.backends import reference
from tests.ops.layouts import channels_last, transposed

Call = tuple[str, tuple[Any, ...]]
Values = Callable[..., Tensor]


def tap(values: Values) -> Iterator[Call]:
    x, dy, l1 = values(2, 3, 4, 5), values(2, 3, 4, 5), torch.ones(())
    yield "tap_backward", (dy,)
    for d_dx, d_l1 in ((x, l1), (x, None), (None, l1), (None, None)):
        yield "tap_double_backward", (d_dx, d_l1, dy)


def fake_quantize(values: Values) -> Iterator[Call]:
    x, dy, d_dx, l1 = values(2, 3, 4, 5), values(2, 3, 4, 5), values(2, 3, 4, 5), torch.ones(())
    for axis, channels in ((None, ()), (1, (3,))):
        # A wide grid clamps nothing: the results equal what came in.
        grid = (torch.ones(channels), torch.zeros(channels), -(2**15) + 1, 2**15 - 1, axis)
        yield "fake_quantize_forward", (x, *grid)
        yield "fake_quantize_forward", (x.round(), *grid)
        yield "fake_quantize_backward", (dy, x, *grid, True)
        yield "fake_quantize_backward", (dy, x, *grid, False)
        for v, d_l1 in ((d_dx, l1), (d_dx, None), (None, l1)):
            yield "fake_quantize_double_backward", (v, d_l1, dy, x, *grid)


def l1_norm(values: Values) -> Iterator[Call]:
    tensors = [values(2, 3), values(4), values()]
    yield "l1_norm_forward", (tensors,)
    yield "l1_norm_forward", (tensors[-1:],)
    yield "l1_norm_backward", (values(3), tensors)
    yield "l1_norm_double_backward", ([values(2, 3), values(4), values()], tensors)


def conv(values: Values) -> Iterator[Call]:
    x, w, b, dy = values(2, 3, 4, 5), values(6, 3, 1, 1), values(6), values(2, 6, 4, 5)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    v, u = values(2, 3, 4, 5), values(6, 3, 1, 1)
    yield "conv_forward", (x, w, None, *geometry)
    yield "conv_forward", (x, w, b, *geometry)
    for mask in ([True, True], [False, True], [True, False], [False, False]):
        yield "conv_backward", (dy, x, w, *geometry, mask)
    for d_dx, d_dw in ((v, u), (v, None), (None, u), (None, None)):
        yield "conv_double_backward", (d_dx, d_dw, dy, x, w, *geometry, [True, True, True])


def conv_transpose(values: Values) -> Iterator[Call]:
    x, w, b, dy = values(2, 3, 4, 5), values(3, 6, 1, 1), values(6), values(2, 6, 4, 5)
    geometry = ([1, 1], [0, 0], [1, 1], [0, 0], 1)
    v, u = values(2, 3, 4, 5), values(3, 6, 1, 1)
    yield "conv_transpose_forward", (x, w, None, *geometry)
    yield "conv_transpose_forward", (x, w, b, *geometry)
    for mask in ([True, True], [False, True], [True, False], [False, False]):
        yield "conv_transpose_backward", (dy, x, w, *geometry, mask)
    for d_dx, d_dw in ((v, u), (v, None), (None, u), (None, None)):
        yield "conv_transpose_double_backward", (d_dx, d_dw, dy, x, w, *geometry, [True, True, True])


def linear(values: Values) -> Iterator[Call]:
    x, w, b, dy, v, u = values(4, 3), values(6, 3), values(6), values(4, 6), values(4, 3), values(6, 3)
    yield "linear_forward", (x, w, b)
    yield "linear_forward", (x, w, None)
    for mask in ([True, True], [False, False]):
        yield "linear_backward", (dy, x, w, mask)
    for d_dx, d_dw in ((v, u), (v, None), (None, u), (None, None)):
        yield "linear_double_backward", (d_dx, d_dw, dy, x, w, [True, True, True])


def batch_norm_act(values: Values) -> Iterator[Call]:
    x, y, dy, v, residual = (values(2, 3, 4, 5) for _ in range(5))
    weight, bias, l1 = values(3), values(3), torch.ones(())
    grid = (torch.tensor(0.25), torch.tensor(3.0), 0, 7)
    # Statistics and their cotangents have the type of the sums.
    mean, var, rstd, d_w = torch.rand(4, 3).to(torch.promote_types(x.dtype, torch.float32)).add(0.5).unbind()
    for training in (True, False):
        for activation in ("none", "relu", "relu6"):
            how = (*((None, None, 0, 0) if activation == "relu6" else grid), training)
            for affine in ((weight, bias), (None, None)):
                for added in (None, residual):
                    head = (x, *affine, mean, var, added)
                    yield "batch_norm_act_forward", (*head, *how, 1e-5, activation)
                saved = (x, y, *affine, mean, rstd, *how, activation)
                yield "batch_norm_act_backward", (dy, *saved, True, True)
                yield "batch_norm_act_backward", (dy, *saved, False, False)
                for cotangents in (
                    (v, d_w, d_w, residual, l1),
                    (v, None, None, None, None),
                    (None, d_w) + (None,) * 3,
                ):
                    yield "batch_norm_act_double_backward", (*cotangents, dy, *saved, True)


SETS = [tap, fake_quantize, l1_norm, conv, conv_transpose, linear, batch_norm_act]


@pytest.mark.parametrize("calls", SETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, transposed, channels_last], ids=lambda f: f.__name__)
def test_arguments_are_neither_returned_nor_changed(
    calls: Callable[[Values], Iterator[Call]], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    for sweep, arguments in calls(lambda *shape: layout(torch.randn(shape).to(dtype))):
        given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        before = [(t.clone(), t._version) for t in given]
        results = tree_leaves(getattr(reference, sweep)(*arguments))
        assert all(torch.equal(t, b) and t._version == v for t, (b, v) in zip(given, before, strict=True)), (
            sweep
        )
        addresses = [t.untyped_storage().data_ptr() for t in (*given, *results) if t.numel()]
        results_alone = addresses[len([t for t in given if t.numel()]) :]
        assert not set(results_alone) & set(addresses[: -len(results_alone)]), f"{sweep} returns an argument"
        assert len(set(results_alone)) == len(results_alone), f"{sweep} returns one tensor twice"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_an_empty_batch_saves_the_same_mask_source_as_a_full_one(residual: bool, quantized: bool) -> None:
    def kept(n: int) -> Tensor:
        x = torch.randn(n, 3, 2)
        grid = (torch.ones(()), torch.zeros(())) if quantized else (None, None)
        vectors = (torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
        return reference.batch_norm_act_forward(
            x, *vectors, x.clone() if residual else None, *grid, 0, 3, True, 1e-5, "relu"
        )[1]

    assert kept(0).shape == ((0, 3, 2) if residual and quantized else (0,))
    assert kept(4).shape == ((4, 3, 2) if residual and quantized else (0,))
