"""A converted model equals the original, and a penalised step equals double backprop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.conversion.changing import CHANGED_VIEWS, CHANGING
from tests.conversion.models import MODELS
from tests.conversion.runs import assert_equal_runs, assert_equal_steps, built, images, loss_of
from tests.networks import NETWORKS, Network

EVERY = {
    **MODELS,
    **CHANGING,
    "sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
}
ROOTS = {"conv as root": lambda: nn.Conv2d(4, 4, 3), "linear as root": lambda: nn.Linear(5, 4)}
each_model = pytest.mark.parametrize("name", [*EVERY, *ROOTS])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@each_model
@each_mode
@pytest.mark.filterwarnings("error")
def test_outputs_gradients_and_statistics(name: str, training: bool) -> None:
    model = built({**EVERY, **ROOTS}[name], training)
    assert_equal_runs(model, gl.convert(model), images())


# Which of the many largest of clamped weights makes the step has no single answer.
TIED = ("ParameterClamped", "ParameterPointedElsewhere")


@pytest.mark.parametrize("name", EVERY)
@each_mode
def test_penalised_steps(name: str, training: bool) -> None:
    x, models = images(), [built(EVERY[name], training) for _ in range(2)]
    scale = "step" if training and name not in TIED else "none"
    assert_equal_steps(models[0], gl.convert(models[1]), loss_of(x), scale=scale)


@pytest.mark.parametrize("name", CHANGED_VIEWS)
@pytest.mark.filterwarnings("error")
def test_changes_through_a_view(name: str) -> None:
    x, models = images(), [built(CHANGED_VIEWS[name]) for _ in range(3)]
    assert_equal_runs(models[0], gl.convert(models[0]), x)
    assert_equal_steps(models[1], gl.convert(models[2]), loss_of(x))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
@each_mode
def test_networks(network: Network, training: bool) -> None:
    model, x = network.make().train(training), network.batch()[0]
    assert_equal_runs(model, gl.convert(model), x)
    assert_equal_steps(network.make().train(training), gl.convert(network.make()).train(training), loss_of(x))


@pytest.mark.parametrize("name", ROOTS)
def test_a_layer_as_the_model(name: str) -> None:
    x, models = images(), [built(ROOTS[name]) for _ in range(2)]
    plain = models[0]
    gradient = torch.autograd.grad(loss_of(x)(plain), plain.weight, create_graph=True)[0].abs().sum()
    converted = gl.convert(models[1])
    penalty = gl.GradL1(converted, 1.0, 0.0, scale="none")
    torch.testing.assert_close(penalty(loss_of(x)(converted)), gradient)
