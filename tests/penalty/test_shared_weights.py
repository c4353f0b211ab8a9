"""Shared and frozen weights, and weights replaced by a functional call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradl1_fast as gl
from tests import oracle
from tests.gradients import assert_gradients
from tests.networks import VGG
from tests.penalty.small import assert_same, curved, linears, ours, truth

SCALES = pytest.mark.parametrize("scale", ["none", "step"])


@SCALES
def test_tied_weights_count_once_with_the_whole_gradient(scale: str) -> None:
    plain = linears(nn.Linear(4, 4), nn.Softplus()).double()
    plain[4].weight = plain[2].weight
    model = gl.convert(plain)
    found = ours(model, gl.GradL1(model, 1.0, 0.0, scale))
    assert list(found.terms) == ["0.weight", "2.weight"]
    assert_same(found, truth(plain, ["0.weight", "2.weight"], lambda_a=0.0, scale=scale))


class Language(nn.Module):
    """Word embeddings that are also the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(tokens))))


def language_loss(model: nn.Module) -> Tensor:
    tokens = torch.arange(12).reshape(2, 6) * 5 % 7
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@SCALES
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_embeddings_that_are_tied_to_the_head(scale: str, per_channel: bool) -> None:
    plain = Language().double()
    model = gl.convert(plain, per_channel=per_channel)
    assert model.head.weight is model.words.weight
    found = ours(model, gl.GradL1(model, 0.3, 0.2, scale), language_loss)
    assert set(found.terms) == {"words.weight", "body.weight", "body.input", "head.input"}
    options = {"lambda_w": 0.3, "lambda_a": 0.2, "scale": scale, "per_channel": per_channel}
    weights = ["words.weight", "body.weight"]
    assert_same(found, truth(plain, weights, ["body", "head"], loss=language_loss, **options))


def test_frozen_weights_are_not_penalised() -> None:
    plain = VGG.make()
    plain[0].requires_grad_(False)
    plain[3].weight.requires_grad_(False)
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0, scale="none")
    loss = VGG.loss(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = torch.autograd.grad(loss + penalty(loss), list(parameters.values()))
    weights = ["7.weight", "12.weight", "14.weight"]
    assert [name for name in penalty.terms if name.endswith("weight")] == weights
    expected = oracle.penalised_gradients(
        lambda: oracle.measure(plain, VGG.loss, weights=weights, inputs_of=["3", "7", "12", "14"]),
        parameters,
        lambda_w=1.0,
        lambda_a=1.0,
    )
    assert_gradients(total, list(expected.gradients.values()))


def replaced(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: (2 * model.get_parameter(name)).detach().requires_grad_() for name in names}


def call(parameters: dict[str, Tensor]) -> object:
    def loss(model: nn.Module) -> Tensor:
        return curved(lambda x: functional_call(model, parameters, (x,)))

    return loss


def with_values(parameters: dict[str, Tensor]) -> nn.Module:
    """Return the plain network with such values."""
    plain = linears()
    with torch.no_grad():
        for name, value in parameters.items():
            plain.get_parameter(name).copy_(value)
    return plain


PARTIAL = {
    "one weight": ["0.weight"],
    "the other, with a bias": ["2.weight", "2.bias"],
    "all": ["0.weight", "0.bias", "2.weight", "2.bias"],
}


@pytest.mark.parametrize("case", PARTIAL)
def test_a_call_that_replaces_weights_is_exact(case: str) -> None:
    model = gl.convert(linears())
    parameters = replaced(model, PARTIAL[case])
    value = gl.GradL1(model, 1.0, 0.0)(call(parameters)(model))
    expected = truth(with_values(parameters), ["0.weight", "2.weight"], lambda_a=0.0)
    torch.testing.assert_close(value.detach(), expected.penalty)


def test_a_call_that_replaces_all_weights_measures_activations() -> None:
    model = gl.convert(linears())
    parameters = replaced(model, [name for name, _ in model.named_parameters()])
    penalty = gl.GradL1(model, 0.0, 1.0)
    loss = call(parameters)(model)
    total = torch.autograd.grad(loss + penalty(loss), list(parameters.values()))
    expected = truth(with_values(parameters), [], ["2"], lambda_w=0.0)
    assert_gradients(list(total), list(expected.gradients.values()))


def test_the_penalty_inside_the_module_that_is_called_is_exact() -> None:
    model = gl.convert(linears())
    objective = nn.Module()
    objective.model = model
    penalty = gl.GradL1(model, 1.0, 1.0)

    def forward() -> Tensor:
        loss = curved(model)
        return loss + penalty(loss)

    objective.forward = forward
    parameters = replaced(model, [name for name, _ in model.named_parameters()])
    named = {f"model.{name}": p for name, p in parameters.items()}
    total = torch.autograd.grad(functional_call(objective, named, ()), list(parameters.values()))
    expected = truth(with_values(parameters), ["0.weight", "2.weight"], ["2"])
    assert_gradients(list(total), list(expected.gradients.values()))
