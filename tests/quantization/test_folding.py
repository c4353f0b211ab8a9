"""Folding keeps the function to 1e-10 in float64, and refuses unsupported batch norms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from tests.networks import MOBILENET, NO_NORM, RESNET, VGG, Network

NORMED = [VGG, RESNET, MOBILENET]


def folded(network: Network, **kwargs: Any) -> tuple[nn.Module, gl.Folding]:
    model = gl.convert(network.make().eval(), **kwargs)
    gl.calibrate(model, [network.batch()])
    return model, gl.fold_batch_norm(model, network.batch()[0])


@pytest.mark.parametrize("network", NORMED, ids=lambda n: n.id)
def test_the_output_is_the_same_and_every_batch_norm_is_gone(network: Network) -> None:
    model, folding = folded(network)
    x = network.batch()[0]
    plain = network.make().eval()
    norms = [n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    after = folding.model(x).detach()
    torch.testing.assert_close(after, plain(x).detach(), rtol=0, atol=1e-10)
    assert set(folding.folded) == set(norms)
    assert not folding.refused
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folding.model.modules())
    assert all(isinstance(folding.model.get_submodule(name), nn.Identity) for name in norms)
    assert type(folding.model) is type(model) is type(plain)
    assert folding.difference == float((after - model(x).detach()).abs().max()) < 1e-10
    assert folding.scale == float(model(x).detach().abs().max())
    assert "folded into" in str(folding)
    assert "largest output difference" in str(folding)


@pytest.mark.parametrize("network", NORMED, ids=lambda n: n.id)
def test_with_a_range_for_each_channel_folding_commutes_with_quantization(network: Network) -> None:
    model, folding = folded(network, per_channel=True)
    x = network.batch()[0]
    for w, a in ((4, None), (3, 5)):
        with gl.bits(model, w=w, a=a), gl.bits(folding.model, w=w, a=a):
            exact, actual = model(x), folding.model(x)
        assert float((exact - model(x)).abs().max()) > 1e-3
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-8)


def test_weights_and_biases_are_those_of_the_formula() -> None:
    _, folding = folded(VGG)
    plain = VGG.make()
    conv, norm = plain[3], plain[4]
    w, gamma, beta, mean, var = (
        t.detach().numpy() for t in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    factor = gamma / np.sqrt(var + norm.eps)
    layer = folding.model.get_submodule("3")
    np.testing.assert_allclose(layer.weight.detach(), w * factor[:, None, None, None], rtol=1e-14)
    np.testing.assert_allclose(layer.bias.detach(), beta - mean * factor, rtol=1e-13)


def test_the_model_is_not_changed_and_shares_unfolded_parts() -> None:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, [VGG.batch()])
    gl.set_bits(model, w=5, a=6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = gl.fold_batch_norm(model).model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert new.get_submodule("12").weight is model.get_submodule("12").weight
    assert new.get_submodule("0").weight is not model.get_submodule("0").weight
    assert new.get_submodule("0").weight_quantizer.bits == 5
    gl.set_bits(new, w=2, a=2)
    assert model.get_submodule("0").weight_quantizer.bits == 5
    assert "12.weight" in new.state_dict()
    assert "1.weight" not in new.state_dict()


def test_a_folded_model_can_be_copied_pickled_calibrated_and_folded_again() -> None:
    _, folding = folded(RESNET)
    x = RESNET.batch()[0]
    y = folding.model(x)
    for twin in (copy.deepcopy(folding.model), pickle.loads(pickle.dumps(folding.model))):
        torch.testing.assert_close(twin(x), y, rtol=0, atol=0)
    gl.calibrate(folding.model, [x])
    again = gl.fold_batch_norm(folding.model, x)
    assert (again.folded, again.refused, again.difference) == ({}, {}, 0.0)
    assert str(again).startswith("largest output difference")


def test_the_penalty_of_a_folded_model_is_that_of_its_plain_twin() -> None:
    _, folding = folded(NO_NORM)
    assert str(gl.fold_batch_norm(folding.model)) == "no batch norm"
    _, folding = folded(VGG)
    model = folding.model
    penalty = gl.GradL1(model, 0.1, 0.1, scale="none")
    loss = VGG.loss(model)
    weights = [m.weight for m in model.modules() if isinstance(m, gl.nn.QuantizedLayer)]
    sites = [q for q in named_quantizers(model).values() if not q.is_input]
    expected = [g.abs().sum() for g in torch.autograd.grad(loss, weights, create_graph=True)]
    penalty(loss).backward()
    actual = [v for name, v in penalty.terms.items() if name.endswith("weight")]
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected).detach(), rtol=1e-12, atol=0)
    assert len(penalty.terms) == len(weights) + len(sites)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_stored_weight_range_is_scaled_or_dropped(per_channel: bool) -> None:
    model = gl.convert(VGG.make().eval(), per_channel=per_channel)
    channels = 6 if per_channel else 1
    layer = model.get_submodule("3")
    layer.weight_quantizer.set_clip(0.05 * torch.arange(1, 1 + channels).double()[None])
    folding = gl.fold_batch_norm(model)
    new = folding.model.get_submodule("3")
    assert folding.without_range == ([] if per_channel else ["3"])
    assert ("stored weight range was dropped" in str(folding)) is not per_channel
    assert (new.weight_quantizer.clip is None) is not per_channel
    assert layer.weight_quantizer.clip is not None
    if per_channel:
        factor = (new.weight / layer.weight).detach().amax((1, 2, 3))
        torch.testing.assert_close(new.weight_quantizer.clip, layer.weight_quantizer.clip * factor)


class ConvReluNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.bn = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.relu(self.conv(x)))


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(torch.relu(self.bn(self.conv(x)))))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.bn(self.conv(x))))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * self.bn(y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(self.conv(x)))


class NormFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


def plain_pair(*norm: Any, **kwargs: Any) -> nn.Module:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module("bn", nn.BatchNorm2d(4, *norm, **kwargs))
    return model


def hooked() -> nn.Module:
    model = plain_pair()
    model.bn.register_forward_hook(lambda module, args, y: None)
    return model


def conv_hooked() -> nn.Module:
    model = plain_pair()
    model.conv.register_forward_hook(lambda module, args, y: None)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv -> ReLU -> BN": (ConvReluNorm, r"bn follows relu \(ReLU\), not a convolution"),
    "shared convolution": (
        SharedConv,
        "bn follows conv, which is called in several places; bn2 follows conv",
    ),
    "shared batch norm": (SharedNorm, "bn is called in several places"),
    "read twice": (ReadTwice, "bn follows conv, whose output is read elsewhere too"),
    "tied weight": (Tied, "bn follows conv, which shares a parameter with another layer"),
    "batch norm first": (NormFirst, "bn follows x, not a convolution"),
    "no statistics": (lambda: plain_pair(track_running_stats=False), "bn has no running statistics"),
    "hooks": (hooked, "bn has hooks"),
    "hooks on the convolution": (conv_hooked, "bn follows conv, which has hooks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batch_norms_that_cannot_be_folded_are_kept_and_named(case: str) -> None:
    build, message = REFUSED[case]
    model = gl.convert(build().double().eval())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"not folded: {message}"):
        folding = gl.fold_batch_norm(model, x)
    assert folding.difference == 0
    assert not folding.folded
    assert "not folded: " in str(folding)


def test_training_mode_is_refused_by_name() -> None:
    model = gl.convert(VGG.make().eval())
    model.get_submodule("4").train()
    with pytest.warns(UserWarning, match="not folded: 4 is in training mode: call model.eval"):
        folding = gl.fold_batch_norm(model)
    assert set(folding.folded) == {"1", "8"}
    assert set(folding.refused) == {"4"}


def test_a_plain_model_and_an_output_without_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="not converted"):
        gl.fold_batch_norm(VGG.make().eval())

    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> float:
            return float(self.conv(x).sum())

    with pytest.raises(TypeError, match="the output holds no tensor to compare"):
        gl.fold_batch_norm(gl.convert(Number().eval()), torch.ones(1, 3, 4, 4))


def test_one_dimensional_batch_norm_after_its_convolution() -> None:
    model = (
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).double().eval()
    )
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    nn.init.uniform_(model[1].running_mean, -1, 1)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    folding = gl.fold_batch_norm(gl.convert(model), x)
    torch.testing.assert_close(folding.model(x), model(x), rtol=0, atol=1e-12)
    assert folding.folded == {"1": "0"}


def test_channels_last_weights_keep_their_layout() -> None:
    model = gl.convert(VGG.make().eval().to(memory_format=torch.channels_last))
    layer = gl.fold_batch_norm(model).model.get_submodule("0")
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
