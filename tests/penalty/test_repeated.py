"""Repeated calls of a penalty or layer, micro-batches, and penalties of copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.gradients import assert_gradients
from tests.networks import NO_NORM, RESNET, VGG
from tests.penalty.small import assert_same, curved, data, gradients, linears, ours, truth


def test_called_twice_it_gives_the_same() -> None:
    model = gl.convert(VGG.make())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), VGG.loss(model)
    first, second = penalty(loss), penalty(loss)
    assert torch.equal(first, second)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(first, parameters, allow_unused=True, retain_graph=True),
        torch.autograd.grad(second, parameters, allow_unused=True),
        strict=True,
    ):
        assert a is b is None or torch.equal(a, b)


class Recurrent(nn.Module):
    """One layer that is called three times, on tensors that are activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.cell, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.last(x)


@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_layer_that_is_called_three_times_counts_each_call(scale: str) -> None:
    plain = Recurrent().double()
    model = gl.convert(plain)
    weights = [f"{name}.weight" for name in ("first", "cell", "last")]
    expected = truth(plain, weights, ["cell", "last"], scale=scale)
    assert len(expected.terms) == 3 + 4
    assert_same(ours(model, gl.GradL1(model, 1.0, 1.0, scale)), expected)


def test_a_manually_created_layer_counts_each_call_with_its_input() -> None:
    torch.manual_seed(4)
    layer, tail = gl.QLinear(3, 3).double(), nn.Linear(3, 3).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tail = layer, tail

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.layer(F.softplus(self.layer(x))))

    model = Twice()
    penalty = gl.GradL1(model, 0.0, 1.0, scale="none")
    value = penalty(curved(model))
    x = data().requires_grad_()
    h = F.softplus(F.linear(x, layer.weight, layer.bias))
    loss = tail(F.linear(h, layer.weight, layer.bias)).square().mean()
    expected = sum(g.abs().sum() for g in torch.autograd.grad(loss, [x, h]))
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)


def test_a_layer_with_the_networks_input_counts_its_other_calls() -> None:
    layer = nn.Linear(3, 3)
    plain = nn.Sequential(layer, nn.Softplus(), layer, nn.Softplus()).double()
    model = gl.convert(plain)
    x = data()

    def activation_alone() -> Tensor:
        h = F.softplus(layer(x))
        return torch.autograd.grad(F.softplus(layer(h)).square().mean(), h)[0].abs().sum()

    value = gl.GradL1(model, 0.0, 1.0, scale="none")(curved(model))
    torch.testing.assert_close(value.detach(), activation_alone())


def test_gradients_accumulate_over_micro_batches() -> None:
    model = gl.convert(NO_NORM.make())
    penalty = gl.GradL1(model, 0.3, 0.2)
    x, y = NO_NORM.batch()
    parts = []
    for half in (slice(0, 3), slice(3, 6)):
        loss = F.cross_entropy(model(x[half]), y[half])
        parts.append(gradients(model, loss + penalty(loss)))
        loss = F.cross_entropy(model(x[half]), y[half])
        (loss + penalty(loss)).backward()
    expected = [a + b for a, b in zip(*parts, strict=True)]
    assert_gradients([p.grad for p in model.parameters()], expected, 1e-12)


def test_a_third_order_raises_through_the_whole_penalty() -> None:
    model = gl.convert(RESNET.make())
    penalise = gl.GradL1(model, 1.0, 1.0)
    penalty = penalise(RESNET.loss(model))
    second = torch.autograd.grad(penalty, list(model.parameters()), create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in second if g is not None)
    with pytest.raises(RuntimeError, match="first and second order gradients only"):
        torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def test_the_probes_keep_no_gradient() -> None:
    model = gl.convert(VGG.make())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), VGG.loss(model)
    (loss + penalty(loss)).backward()
    assert penalty.sites
    assert all(site.probe.grad is None for site in penalty.sites)


def test_a_copy_of_the_model_can_have_its_own_penalty() -> None:
    model = gl.convert(linears())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    penalties = [gl.GradL1(m, 1.0, 1.0) for m in (model, twin)]
    first, second = (penalty(curved(penalty.model)) for penalty in penalties)
    assert not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no gradient reached any weight"):
        penalties[0](curved(twin))


def test_autocast_sums_in_float32() -> None:
    model = gl.convert(VGG.make(torch.float32))
    penalty = gl.GradL1(model, 1.0, 1.0)
    x, y = VGG.batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
        value = penalty(loss)
    assert value.dtype == torch.float32
    exact = penalty(F.cross_entropy(model(x), y))
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0)
    (loss + value).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_penalty_is_the_same_inside_and_outside_autocast() -> None:
    """A loss of float32, of which the backward pass has products that autocast would round."""
    model = gl.convert(linears().float())
    penalty, mix = gl.GradL1(model, 1.0, 1.0), torch.randn(4, 4)
    loss = (model(data().float()) @ mix).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        inside = penalty(loss)
    assert torch.equal(inside, penalty(loss))
