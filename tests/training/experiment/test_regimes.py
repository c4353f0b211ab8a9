"""Regimes: what each may use, on a network that was trained on other images than it is calibrated with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.experiment.regimes import REGIMES, evaluate
from gradl1_fast.training.models import digits_net

WIDTHS = [(None, None), (3, 4), (2, None)]


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = gl.convert(digits_net(4)).eval()
    gl.reestimate_batch_norm(model, [images()])
    return model


def images() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def output_sum(model: nn.Module) -> float:
    return float(model(images()).detach().abs().sum())


def by_hand(name: str, width: tuple[int | None, int | None]) -> float:
    w, a = width
    if name.startswith("calibrated"):
        rounding = "gptq" if "gptq" in name else None
        model = gl.prepare(trained(), [images()], w=w, a=a, rounding=rounding).model
        if a is None:  # the regime has ranges at every width
            gl.calibrate(model, [images()], ranges="mse")
        return output_sum(model)
    model = gl.convert(digits_net(4), per_channel=name == "per channel").eval()
    model.load_state_dict(trained().state_dict())
    ends = float(images().min()), float(images().max())
    gl.calibrate(model, ranges=gl.ranges.BatchNormStatistics(known={"0.input": ends}))
    gl.calibrate_weights(model)
    gl.set_bits(model, w=w, a=a)
    return output_sum(model)


@pytest.mark.parametrize("name", REGIMES)
def test_a_regime_is_its_steps_by_hand_and_leaves_the_model(name: str) -> None:
    model = trained()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = evaluate(REGIMES[name], model, images(), WIDTHS, output_sum, len(images()))
    assert found == [output_sum(trained()), *(by_hand(name, width) for width in WIDTHS[1:])]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model[0].weight_quantizer.axis is None
    assert model[0].input_quantizer.low is None
