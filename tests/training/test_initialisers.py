"""Initial weights: their deviations, and that seeds decide them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradl1_fast.training.config import Config, Model
from gradl1_fast.training.models import INITIALISERS, initialise
from gradl1_fast.training.runs import folder as runs

FAN_IN, FAN_OUT = 64 * 9, 128 * 9
DEVIATIONS = {
    "he-normal": math.sqrt(2 / FAN_IN),
    "he-uniform": math.sqrt(2 / FAN_IN),
    "glorot-normal": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "glorot-uniform": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "normal-0.02": 0.02,
    "normal-0.1": 0.1,
    "uniform-0.05": 0.05 / math.sqrt(3),
    "uniform-0.2": 0.2 / math.sqrt(3),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_the_deviation_is_that_of_the_name(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128))
    initialise(model, name)
    assert float(model[0].weight.detach().std()) == pytest.approx(DEVIATIONS[name], rel=0.02)
    assert not model[0].bias.any()
    assert (model[1].weight == 1).all()


def test_depthwise_convolutions_begin_wider_with_he():
    torch.manual_seed(0)
    deep, wide = nn.Conv2d(256, 256, 3, groups=256), nn.Conv2d(64, 64, 3)
    for layer in (deep, wide):
        initialise(layer, "he-normal")
    assert float(deep.weight.detach().std() / wide.weight.detach().std()) == pytest.approx(8, rel=0.1)


def test_a_seed_gives_one_network():
    config, weights = Config(model=Model(width=4, initialiser="he-normal")), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(runs.network(config, 10, 1).state_dict()["0.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_initialiser_is_named():
    with pytest.raises(ValueError, match=r"initialiser must be one of 'he-normal', .*got 'zero'"):
        initialise(nn.Linear(1, 1), "zero")
