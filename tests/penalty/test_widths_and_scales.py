"""The penalty uses the width and the scale of the forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn.quantizers import WeightQuantizer
from gradl1_fast.penalty.weight_steps import weight_steps
from tests.penalty.small import curved, data, linears

AT_1_BIT = "cannot penalise 0.weight at 1 bit: use float or at least 2 bits"
ANOTHER_SCALE = "another penalty with a different scale"


def test_one_bit_weights_are_refused() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w=1, a=None), pytest.raises(RuntimeError, match=AT_1_BIT):
        penalty(curved(model))


def test_the_width_that_counts_is_that_of_the_forward_pass() -> None:
    model = gl.convert(linears())
    gl.calibrate(model, [data()])
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w=1, a=4):
        clamped = curved(model)
    with pytest.raises(RuntimeError, match=AT_1_BIT):
        penalty(clamped)
    with pytest.raises(RuntimeError, match=AT_1_BIT):
        penalty(clamped + curved(model))
    loss = curved(model)
    expected = penalty(loss)
    with gl.bits(model, w=1, a=4):
        assert torch.equal(penalty(loss), expected)


def test_a_layer_that_is_the_whole_model_is_refused_at_one_bit() -> None:
    model = gl.QLinear(3, 2).double()
    penalty = gl.GradL1(model, 1.0, 0.0)
    model.weight_quantizer.bits = 1
    with pytest.raises(RuntimeError, match="cannot penalise weight at 1 bit"):
        penalty(curved(model))


def test_weights_that_were_computed_and_put_in_place_are_refused_at_one_bit() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.0)
    objective = nn.Module()
    objective.model = model
    objective.forward = lambda: penalty(curved(model))
    computed = {f"model.{name}": 2 * p for name, p in model.named_parameters()}
    assert torch.func.functional_call(objective, computed, ()).isfinite()
    with gl.bits(model, w=1, a=None), pytest.raises(RuntimeError, match=AT_1_BIT):
        torch.func.functional_call(objective, computed, ())


def test_a_frozen_layer_may_be_clamped() -> None:
    model = gl.convert(linears())
    model.get_submodule("0").weight.requires_grad_(False)
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w={"0": 1}, a=None):
        penalty(curved(model))
    assert list(penalty.terms) == ["2.weight"]


def test_a_layer_that_the_step_did_not_use_may_be_clamped() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w={"2": 1}, a=None):
        penalty(model[:2](data()).square().mean())
    assert penalty.terms["2.weight"] == 0


def test_two_penalties_of_one_model_must_agree_on_the_scale() -> None:
    model = gl.convert(linears())
    first = gl.GradL1(model, 1.0, 1.0)
    second = gl.GradL1(model, 1.0, 1.0, scale="none")
    with pytest.raises(RuntimeError, match=ANOTHER_SCALE):
        first(curved(model))
    assert second(curved(model)).isfinite()


def test_the_scale_that_counts_is_that_of_the_forward_pass() -> None:
    model = gl.convert(linears())
    by_step = gl.GradL1(model, 1.0, 1.0)
    loss = curved(model)
    expected = by_step(loss)
    plain = gl.GradL1(model, 1.0, 1.0, scale="none")
    assert torch.equal(by_step(loss), expected)
    with pytest.raises(RuntimeError, match=rf"{ANOTHER_SCALE}.*2\.input"):
        plain(loss)
    wider = gl.GradL1(model, 1.0, 1.0, step_bits=8)
    with pytest.raises(RuntimeError, match=ANOTHER_SCALE):
        wider(loss)
    loss = curved(model)
    last = gl.GradL1(model, 1.0, 1.0, scale="none")
    assert wider(loss).isfinite()
    assert last(curved(model)).isfinite()


def test_penalties_on_weights_alone_need_not_agree_on_the_scale() -> None:
    model = gl.convert(linears())
    by_step, plain = gl.GradL1(model, 1.0, 0.0), gl.GradL1(model, 1.0, 0.0, scale="none")
    loss = curved(model)
    assert by_step(loss) < plain(loss)


EXTREMES = [
    [1, -1, 0.5],
    [2, 1, 2],
    [-3, -3, -1],
    [0, 0, 0],
    [1e-320, 0, 0],
    [1, -2, -2],
    [math.nan, 1, 2],
    [math.inf, 1, -2],
]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_steps_of_weights_together_equal_those_of_each_quantizer(bits: int) -> None:
    together = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in EXTREMES]
    steps = weight_steps(together, together, bits)
    (steps * torch.arange(1, len(steps) + 1)).sum().backward()
    for i, (weight, step) in enumerate(zip(together, steps, strict=True), 1):
        alone = weight.detach().clone().requires_grad_()
        expected = WeightQuantizer(per_channel=False, out_axis=0).step(alone, bits)
        (i * expected).backward()
        torch.testing.assert_close(step, expected, rtol=1e-15, atol=0, equal_nan=True)
        torch.testing.assert_close(weight.grad, alone.grad, rtol=1e-15, atol=0, equal_nan=True)
