"""Codes of another weight or range are refused, and folding keeps or reports them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.quantization.rounding.models import (
    DTYPE,
    VGG,
    X,
    calibrated,
    layers,
    output,
    rounded,
)


def train(model: nn.Module) -> None:
    VGG.loss(model, DTYPE).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def through_data(model: nn.Module) -> None:
    layers(model)["3"].weight.data.add_(0.01)


def one_value(model: nn.Module) -> None:
    with torch.no_grad():
        layers(model)["3"].weight[1, 2, 0, 1] += 1e-3


def swapped(model: nn.Module) -> None:
    layer = layers(model)["3"]
    layer.weight = nn.Parameter(layer.weight.detach().flip(2))


STALE: dict[str, Callable[[nn.Module], object]] = {
    "training": train,
    "through .data": through_data,
    "one value": one_value,
    "the same values in other places": swapped,
    "other weights": lambda m: m.load_state_dict({k: 1.1 * t for k, t in m.state_dict().items()}),
    "another range": lambda m: gl.calibrate_weights(m, ranges="percentile"),
    "no range": lambda m: gl.calibrate_weights(m, ranges="min_max"),
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("copied", [False, True])
def test_codes_of_another_weight_or_range_are_refused(copied: bool, case: str) -> None:
    model = rounded()
    output(model, 3)
    model = copy.deepcopy(model) if copied else model
    STALE[case](model)
    with pytest.raises(
        RuntimeError, match=r"the weight of \d+, or .* rounded at 3 bits: call .*clear_rounding"
    ):
        output(model, 3, None)
    output(model, 4, None)
    gl.clear_rounding(model, w=4)
    assert layers(model)["0"].weight_quantizer.rounded
    gl.clear_rounding(model, w=3)
    output(model, 3, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_a_narrower_type_does_not_count_as_a_change(dtype: torch.dtype) -> None:
    model = copy.deepcopy(rounded()).to(dtype)
    layer = layers(model)["3"]
    layer.weight_quantizer.bits = 3
    quantized = layer.weight_quantizer(layer.weight)
    scale = layer.weight_quantizer.grid(layer.weight, 3)[0].reshape(-1, 1, 1, 1)
    assert torch.equal(quantized, (layer.weight_quantizer.rounded[3] * scale).to(dtype))


def test_folding_keeps_per_channel_codes_and_reports_dropped_ones() -> None:
    model: Any = rounded()
    with torch.no_grad():
        model[1].weight[::2] *= -1
    folding = gl.fold_batch_norm(model)
    assert not folding.without_rounding
    expected = output(model, 3, None)
    torch.testing.assert_close(output(folding.model, 3, None), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(gl.fold_batch_norm(calibrated()).model, 3, None), expected, rtol=1e-2)
    of_tensors = gl.convert(VGG.make(DTYPE).eval())
    gl.round_weights(of_tensors, [X], w=3)
    dropped = gl.fold_batch_norm(of_tensors)
    assert dropped.without_rounding == ["0", "3", "7"]
    assert "0 rounded to nearest again" in " ".join(str(dropped).split())
    assert layers(dropped.model)["12"].weight_quantizer.rounded
    output(dropped.model, 3, None)
    flat = gl.fold_batch_norm(model).model
    gl.round_weights(flat, [X], w=3)
    equalized = gl.equalize(flat)
    assert set(equalized.without_rounding) == {name for pair in equalized.pairs for name in pair}
    output(equalized.model, 3, None)
