"""Public functions refuse bad arguments by name; autocast determines the type of products."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast import functional as F


class Watching(TorchDispatchMode):
    """Notes whether backward operators were asked for their l1 term, their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.with_l1: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gradl1_fast" and func.overloadpacket.__name__.endswith("backward"):
            self.with_l1.append(args[-1])
        return func(*args, **(kwargs or {}))


X, W, C = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3), torch.ones(3)
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
TRAIN = {"training": True}

REFUSED: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "probe of a vector": (
        lambda: F.tap(X, C),
        ValueError,
        r"tap: probe must be a scalar tensor, got shape \(3,\)",
    ),
    "probe elsewhere": (
        lambda: F.tap(X, ZERO.to("meta")),
        ValueError,
        "tap: all tensors must be on one device",
    ),
    "scale of a probe": (lambda: F.scale_probe(ZERO, C), ValueError, "scale_probe: probe must be a scalar"),
    "integers": (
        lambda: F.fake_quantize(X.int(), ONE, ZERO, 0, 7),
        TypeError,
        r"fake_quantize: every tensor must have a floating type, got torch\.int32",
    ),
    "integers normalised": (
        lambda: F.batch_norm_act(X.int(), None, None, **TRAIN),
        TypeError,
        r"batch_norm_act: every tensor .* got torch\.int32",
    ),
    "norm of integers": (lambda: F.l1_norm([X, X.int()]), TypeError, r"l1_norm: .* got torch\.int32"),
    "complex tap": (lambda: F.tap(X.cfloat(), ZERO), TypeError, r"tap: .* got torch\.complex64"),
    "complex product": (
        lambda: F.linear(X.cfloat(), X[0, 0].cfloat()),
        TypeError,
        r"linear: .* got torch\.complex64",
    ),
    "complex bias": (lambda: F.conv(X, W, C.cfloat()), TypeError, r"conv: .* got torch\.complex64"),
    "codes upside down": (
        lambda: F.fake_quantize(X, ONE, ZERO, 7, 0),
        ValueError,
        "q_max - q_min must be from 0",
    ),
    "too many codes": (
        lambda: F.fake_quantize(X, ONE, ZERO, 0, 2**16),
        ValueError,
        "q_max - q_min must be from 0",
    ),
    "axis": (lambda: F.fake_quantize(X, C, C, 0, 7, axis=4), ValueError, "axis 4 is out of range"),
    "scale of 3": (lambda: F.fake_quantize(X, C, C, 0, 7), ValueError, r"scale must have 1 value\(s\)"),
    "scale of 1": (
        lambda: F.fake_quantize(X, ONE, C, 0, 7, axis=1),
        ValueError,
        r"scale must have 3 value\(s\)",
    ),
    "zero point of 1": (
        lambda: F.fake_quantize(X, C, ZERO, 0, 7, axis=1),
        ValueError,
        "zero_point must have 3",
    ),
    "learned scale": (
        lambda: F.fake_quantize(X, ONE.clone().requires_grad_(), ZERO, 0, 7),
        ValueError,
        "scale and zero_point receive no gradient here",
    ),
    "no tensor": (lambda: F.l1_norm([]), ValueError, "l1_norm: needs at least one tensor"),
    "weight of 2 dimensions": (
        lambda: F.conv(X, C[None]),
        ValueError,
        "weight must have 3, 4 or 5 dimensions",
    ),
    "weight of another dimension": (
        lambda: F.conv(X, W[0]),
        ValueError,
        "takes an input of 3, or 2 without a batch",
    ),
    "stride of 3": (
        lambda: F.conv(X, W, stride=(1, 1, 1)),
        ValueError,
        "stride must be one number or 2 of them",
    ),
    "padding by name": (lambda: F.conv(X, W, padding="full"), ValueError, "'same' or 'valid', got 'full'"),
    "same with a stride": (
        lambda: F.conv(X, W, padding="same", stride=2),
        ValueError,
        "'same' needs stride 1",
    ),
    "transposed, weight of 2 dimensions": (
        lambda: F.conv_transpose(X, C[None]),
        ValueError,
        "conv_transpose: weight must have 3, 4 or 5 dimensions",
    ),
    "transposed, weight of another dimension": (
        lambda: F.conv_transpose(X, W[0]),
        ValueError,
        "conv_transpose: a weight of 3 dimensions takes an input of 3, or 2 without a batch",
    ),
    "transposed, padding by name": (
        lambda: F.conv_transpose(X, W, padding="same"),
        ValueError,
        "conv_transpose: padding must be one number or 2 of them, got 'same'",
    ),
    "transposed, output padding of 3": (
        lambda: F.conv_transpose(X, W, output_padding=(1, 1, 1)),
        ValueError,
        "conv_transpose: output_padding must be one number or 2 of them",
    ),
    "transposed, output padding as large as the stride": (
        lambda: F.conv_transpose(X, W.transpose(0, 1), stride=2, output_padding=2),
        RuntimeError,
        "output padding must be smaller than either stride or dilation",
    ),
    "transposed, channels": (lambda: F.conv_transpose(X, W), RuntimeError, "to have 4 channels, but got 3"),
    "transposed, integers": (
        lambda: F.conv_transpose(X.int(), W),
        TypeError,
        r"conv_transpose: .* got torch\.int32",
    ),
    "channels of a convolution": (lambda: F.conv(X[:, :2], W), RuntimeError, "to have 3 channels, but got 2"),
    "features": (lambda: F.linear(X, C[None]), RuntimeError, "cannot be multiplied"),
    "activation": (
        lambda: F.batch_norm_act(X, None, None, training=True, activation="gelu"),
        ValueError,
        "activation must be 'none', 'relu' or 'relu6', got 'gelu'",
    ),
    "half a grid": (
        lambda: F.batch_norm_act(X, None, None, **TRAIN, grid=(ONE, None, 0, 7)),
        TypeError,
        "zero_point must be a tensor, got None",
    ),
    "a grid for each channel": (
        lambda: F.batch_norm_act(X, None, None, **TRAIN, grid=(C, C, 0, 7)),
        ValueError,
        r"scale must have 1 value\(s\) here, got \(3,\)",
    ),
    "codes of a grid": (
        lambda: F.batch_norm_act(X, None, None, **TRAIN, grid=(ONE, ONE, 7, 0)),
        ValueError,
        "q_max - q_min must be from 0 to 65535",
    ),
    "a grid that learns": (
        lambda: F.batch_norm_act(X, None, None, **TRAIN, grid=(ONE.clone().requires_grad_(), ONE, 0, 7)),
        ValueError,
        "scale and zero_point receive no gradient here",
    ),
    "evaluation alone": (
        lambda: F.batch_norm_act(X, None, None),
        ValueError,
        "evaluation needs running_mean",
    ),
    "half the statistics": (lambda: F.batch_norm_act(X, C, None, **TRAIN), ValueError, "give both"),
    "a vector": (
        lambda: F.batch_norm_act(C, None, None, **TRAIN),
        ValueError,
        r"x must have shape \(N, C, \*size\)",
    ),
    "statistics of 2": (
        lambda: F.batch_norm_act(X, C[:2], C),
        ValueError,
        r"running_mean must have shape \(3,\)",
    ),
    "weight of 2": (lambda: F.batch_norm_act(X, C, C, C[:2]), ValueError, r"weight must have shape \(3,\)"),
    "residual": (
        lambda: F.batch_norm_act(X, C, C, residual=X[..., :2]),
        RuntimeError,
        "must match the existing size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", F.__all__)
def test_every_function_is_documented(name: str) -> None:
    doc = inspect.getdoc(getattr(F, name)) or ""
    assert len(doc.splitlines()) > 2
    assert set(F.__all__) <= set(vars(F))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_follow_autocast(dtype: torch.dtype) -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = F.conv(x, w, torch.ones(4))
        assert y.dtype == F.linear(x, torch.ones(2, 5)).dtype == dtype
        assert F.conv(x.double(), w.double()).dtype == torch.float64
        assert F.conv_transpose(x, w.transpose(0, 1)).dtype == dtype
    gradients = torch.autograd.grad(y.float().sin().sum(), (x, w), create_graph=True)
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, w))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in second)


def test_a_tap_costs_nothing_without_gradients() -> None:
    probe = torch.zeros((), requires_grad=True)
    assert F.tap(X, probe).data_ptr() == X.data_ptr()
    with torch.no_grad():
        assert F.tap(X, probe) is X
    assert F.tap(X, probe.detach()) is X


@pytest.mark.parametrize("asked", [True, False])
def test_the_l1_term_is_computed_only_for_a_probe_that_requires_it(asked: bool) -> None:
    x, probe = torch.ones(2, 3, requires_grad=True), torch.zeros((), requires_grad=asked)
    for function in (
        lambda: F.fake_quantize(x, ONE, ZERO, -7, 7, probe=probe),
        lambda: F.batch_norm_act(x, None, None, training=True, probe=probe),
    ):
        with Watching() as mode:
            torch.autograd.grad(function().sum(), x, create_graph=True)
        assert set(mode.with_l1) == {asked}


def test_scale_probe_multiplies_the_l1_term_and_is_differentiated_once_more() -> None:
    probe, scale = torch.zeros((), requires_grad=True), torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    loss = (F.tap(x, F.scale_probe(probe, scale)) ** 2).sum()
    l1 = torch.autograd.grad(loss, probe, create_graph=True)[0]
    of_scale, of_x = torch.autograd.grad(l1, (scale, x))
    assert (l1.item(), of_scale.item(), of_x.tolist()) == (18, 6, [6, -6])
    assert torch.autograd.grad(loss, scale, allow_unused=True) == (None,)
