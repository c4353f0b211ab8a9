"""Penalty and total gradient of whole networks compared with double backprop in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests import oracle
from tests.gradients import assert_gradient
from tests.networks import NETWORKS, WITHOUT_TIES, Network, layers, refuse_ties

LAMBDAS = {"weights": (0.3, 0.0), "activations": (0.0, 0.2), "both": (0.3, 0.2)}
each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
each_without_ties = pytest.mark.parametrize("network", WITHOUT_TIES, ids=lambda n: n.id)


def truth(
    network: Network, lambdas: tuple[float, float], scale: str = "none", training: bool = True, bits: int = 0
) -> oracle.Penalised:
    model = network.make().train(training)
    names = layers(model)
    weights = [f"{name}.weight" for name in names]
    if bits:
        x = network.batch()[0]
        refuse_ties(model)
        options = {"weight_bits": bits, "activation_bits": bits, "input_bits": 8}
        oracle.quantize(model, lambda m: m(x), weights=weights, inputs_of=names, **options)
    result = oracle.penalised_gradients(
        lambda: oracle.measure(model, network.loss, weights=weights, inputs_of=names[1:]),
        dict(model.named_parameters()),
        lambda_w=lambdas[0],
        lambda_a=lambdas[1],
        scale=scale,
    )
    original = ".parametrizations.weight.original"
    gradients = {name.replace(original, ".weight"): g for name, g in result.gradients.items()}
    return oracle.Penalised(result.loss, result.penalty, result.terms, gradients)


def ours(
    network: Network,
    lambdas: tuple[float, float],
    scale: str = "none",
    training: bool = True,
    bits: int = 0,
    dtype: torch.dtype = torch.float64,
    channels_last: bool = False,
    backward: bool = True,
) -> oracle.Penalised:
    model = gl.convert(network.make(dtype).train(training))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if bits:
        gl.calibrate(model, [network.batch(dtype)])
        gl.set_bits(model, w=bits, a=bits)
    penalty = gl.GradL1(model, *lambdas, scale=scale)
    x, y = network.batch(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    loss = nn.functional.cross_entropy(model(x), y)
    extra = penalty(loss)
    parameters = dict(model.named_parameters())
    if backward:
        (loss + extra).backward()
        gradients = {name: p.grad for name, p in parameters.items()}
    else:
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss + extra, list(parameters.values())), strict=True)
        )
    return oracle.Penalised(loss.detach(), extra.detach(), dict(penalty.terms), gradients)


def assert_same(
    actual: oracle.Penalised, expected: oracle.Penalised, rtol: float, tiny: float = 1e-3
) -> None:
    """Compare the penalty, and the gradient of every parameter in its own norm.

    The error of a parameter whose gradient is less than ``tiny`` of the whole is held against that.
    """
    torch.testing.assert_close(actual.penalty.double(), expected.penalty, rtol=rtol, atol=0)
    assert actual.gradients.keys() == expected.gradients.keys()
    whole = _norm(list(expected.gradients.values()))
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        assert found.shape == gradient.shape
        error = (found.double() - gradient).norm()
        assert error <= rtol * max(gradient.norm(), tiny * whole), f"{name}: {error:.3g}"
    assert_gradient(_flat(actual), _flat(expected), rtol)


def _flat(result: oracle.Penalised) -> Tensor:
    return torch.cat([g.flatten().double() for _, g in sorted(result.gradients.items())])


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


@each_network
@pytest.mark.parametrize("lambdas", LAMBDAS)
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equal_in_float64(network: Network, lambdas: str, scale: str, training: bool) -> None:
    arguments = (network, LAMBDAS[lambdas], scale, training)
    assert_same(ours(*arguments), truth(*arguments), 1e-10)


@each_without_ties
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equal_at_4_bits(network: Network, scale: str, training: bool) -> None:
    arguments = (network, LAMBDAS["both"], scale, training, 4)
    assert_same(ours(*arguments), truth(*arguments), 1e-10)


VARIANTS: dict[str, dict[str, Any]] = {
    "autograd.grad": {"backward": False},
    "channels_last": {"channels_last": True},
    "channels_last, 4 bits, autograd.grad": {"channels_last": True, "bits": 4, "backward": False},
}


@each_without_ties
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_in_every_form(network: Network, variant: str) -> None:
    options = VARIANTS[variant]
    expected = truth(network, LAMBDAS["both"], bits=options.get("bits", 0))
    assert_same(ours(network, LAMBDAS["both"], **options), expected, 1e-10)


@each_network
@pytest.mark.parametrize(("scale", "channels_last"), list(product(["none", "step"], [False, True])))
def test_equal_in_float32(network: Network, scale: str, channels_last: bool) -> None:
    actual = ours(network, LAMBDAS["both"], scale, dtype=torch.float32, channels_last=channels_last)
    # Ordinary double backprop in float32 errs as much: 1.5e-5 in one small gradient of the ResNet.
    assert_same(actual, truth(network, LAMBDAS["both"], scale), 1e-5, tiny=0.1)


@each_network
def test_terms_are_those_of_the_oracle(network: Network) -> None:
    expected = truth(network, LAMBDAS["both"]).terms
    names = layers(network.make())
    wanted = {f"{name}.input" if name in names else name: value for name, value in expected.items()}
    actual = ours(network, LAMBDAS["both"]).terms
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=0)
