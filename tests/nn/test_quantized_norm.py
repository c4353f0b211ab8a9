"""A quantizer behind a batch norm: computed with it, or alone where something needs what comes between."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer
from tests.gradients import assert_gradients


def quantized_norm(activation: str) -> gl.BatchNormAct2d:
    """Return a batch norm whose quantizer has 3 bits and cuts off some of what arrives, in float64."""
    layer = gl.BatchNormAct2d(4, activation=activation, quantize_output=True).double()
    torch.nn.init.normal_(layer.weight)
    assert layer.quantizer is not None
    layer.quantizer.bits = 3
    layer.quantizer.set_range(torch.tensor(-0.5), torch.tensor(1.0))
    return layer


def penalised(layer: gl.BatchNormAct2d, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Return the output, the l1 term and the gradients of loss + penalty."""
    assert layer.quantizer is not None
    assert layer.quantizer.probe is not None
    layer.quantizer.probe.requires_grad_()
    inputs = [x.clone().requires_grad_(), *([] if residual is None else [residual.clone().requires_grad_()])]
    y = layer(*inputs)
    loss = y.sin().sum()
    dw, l1 = torch.autograd.grad(loss, [layer.weight, layer.quantizer.probe], create_graph=True)
    return [y, l1, *torch.autograd.grad(loss + dw.abs().sum() + l1, [*inputs, layer.weight, layer.bias])]


class Called(TorchDispatchMode):
    """Counts the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gradl1_fast":
            self.names[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_quantizer_folds_into_its_batch_norm(activation: str, with_residual: bool) -> None:
    x, residual = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64).unbind()
    layer, after = quantized_norm(activation), None if not with_residual else residual
    with Called() as called:
        folded = penalised(layer, x, after)
    assert not any("fake_quantize" in name for name in called.names)
    assert called.names["batch_norm_act_double_backward"] == 1
    layer.quantizer.register_forward_hook(lambda *_: None)  # it wants the quantizer's own input
    with Called() as called:
        alone = penalised(layer, x, after)
    assert called.names["fake_quantize_double_backward"] == 1
    assert_gradients(folded, alone, 1e-12)


@pytest.mark.parametrize("needed_by", ["observer", "step", "hook", "subclass", "own forward"])
def test_what_needs_the_values_before_the_quantizer_gets_them(needed_by: str) -> None:
    layer, seen = quantized_norm("relu"), []
    quantizer = layer.quantizer
    if needed_by == "observer":
        quantizer.observer = SimpleNamespace(update=seen.append)
    elif needed_by == "step":
        quantizer.step_bits = 4
        quantizer.step = lambda x, bits: seen.append(x) or torch.ones((), dtype=x.dtype)
        quantizer.probe.requires_grad_()
    elif needed_by == "hook":
        quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    elif needed_by == "own forward":  # as libraries that wrap modules do it
        own = quantizer.forward
        quantizer.forward = lambda x: seen.append(x) or own(x)
    else:

        class Own(ActivationQuantizer):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(x)
                return super().forward(x)

        quantizer.__class__ = Own
    layer(torch.randn(5, 4, 3, 2, dtype=torch.float64))
    assert len(seen) == 1
    assert len(seen[0].unique()) > 8  # not on the grid


def test_a_step_that_nobody_measures_keeps_nothing_apart() -> None:
    layer = quantized_norm("relu")
    layer.quantizer.step_bits = 4
    with torch.no_grad(), Called() as called:
        layer(torch.randn(5, 4, 3, 2, dtype=torch.float64))
    assert list(called.names) == ["batch_norm_act_forward"]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_evaluation_is_that_of_the_two_operations(dtype: torch.dtype, with_residual: bool) -> None:
    layer = quantized_norm("relu").to(dtype).eval()
    inputs = torch.randn(1 + with_residual, 5, 4, 3, 2).to(dtype).unbind()
    folded = layer(*inputs)
    layer.quantizer.register_forward_hook(lambda *_: None)
    assert torch.equal(folded, layer(*inputs))


def test_without_a_range_nothing_is_counted() -> None:
    layer = gl.BatchNormAct2d(4, quantize_output=True)
    layer.quantizer.bits = 4
    with pytest.raises(RuntimeError, match="calibrate first"):
        layer(torch.randn(5, 4, 3, 2))
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()
