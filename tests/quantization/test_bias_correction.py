"""Corrected biases restore the mean of each output channel of the float layer, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import RESNET, VGG, Network


def folded(network: Network) -> nn.Module:
    model = gl.convert(network.make().eval())
    return gl.fold_batch_norm(model).model


def batches(network: Network) -> list[Tensor]:
    x = network.batch()[0]
    return [x, 2 * x[:3]]  # of unequal sizes: the mean is over all examples


def rounded(weight: Tensor, bits: int) -> Tensor:
    scale = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


@pytest.mark.parametrize("network", [VGG, RESNET], ids=lambda n: n.id)
def test_the_mean_of_each_channel_is_that_of_the_float_layer(network: Network) -> None:
    model = folded(network)
    inputs: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, gl.nn.QuantizedLayer)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0].detach()))
        for n, m in layers.items()
    ]
    for x in batches(network):
        model(x)
    for hook in hooks:
        hook.remove()
    corrected = gl.correct_bias(model, batches(network), w=3)
    for name, layer in layers.items():
        new = corrected.get_submodule(name)
        assert new.weight is layer.weight
        w = layer.weight.detach()
        difference = [
            apply(layer, x, rounded(w, 3), new.bias) - apply(layer, x, w, layer.bias) for x in inputs[name]
        ]
        assert max(float(d.abs().max()) for d in difference) > 1e-2
        rows = torch.cat([d.movedim(1, -1).reshape(-1, len(w)) for d in difference])
        torch.testing.assert_close(rows.mean(0), torch.zeros(len(w), dtype=torch.float64), rtol=0, atol=1e-12)


def apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.detach()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def test_the_model_is_not_changed_and_the_network_loses_less() -> None:
    model = folded(VGG)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    corrected = gl.correct_bias(model, batches(VGG), w=3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    x = torch.cat(batches(VGG))
    exact = model(x).detach()
    shifts = []
    for candidate in (model, corrected):
        with gl.bits(candidate, w=3, a={}):
            shifts.append(float((candidate(x).detach() - exact).mean(0).norm()))
    assert shifts[1] < 0.7 * shifts[0]


def test_layers_at_float_and_without_bias() -> None:
    plain = gl.convert(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    x = torch.randn(2, 3, 8, 8)
    corrected = gl.correct_bias(plain, [x], w={"0": 2})
    assert corrected.get_submodule("0").bias.shape == (4,)
    assert corrected.get_submodule("2").bias is plain.get_submodule("2").bias
    assert gl.correct_bias(plain, [x], w=None).get_submodule("0").bias is None
    assert {m.bits for m in corrected.modules() if isinstance(m, gl.nn.WeightQuantizer)} == {None}


def test_bad_data_are_named() -> None:
    model = folded(VGG)
    bad = VGG.batch()[0].clone()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="correct_bias: the input or the weight of '0' holds NaN"):
        gl.correct_bias(model, [bad], w=4)
    with pytest.raises(ValueError, match="correct_bias: got no batches"):
        gl.correct_bias(model, [], w=4)
    with pytest.raises(ValueError, match="unknown name 'x'"):
        gl.correct_bias(model, [bad], w={"x": 4})


class Sparing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = gl.QLinear(3, 3), gl.QLinear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_no_value_reaches_is_named_and_keeps_its_bias() -> None:
    model = Sparing()
    with pytest.warns(UserWarning, match="correct_bias: no value reached spare: its bias is unchanged"):
        corrected = gl.correct_bias(model, [torch.ones(2, 3)], w=4)
    assert corrected.spare.bias is model.spare.bias
    assert corrected.used.bias is not model.used.bias


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(9, 4), nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, *, factor: float) -> Tensor:
        y = self.words(ids).movedim(-1, 1) * factor
        return self.head(self.up(y).movedim(1, -1))


def test_transposed_convolutions_and_models_with_keyword_arguments() -> None:
    model, ids = gl.convert(Decoder().double().eval()), torch.randint(9, (6, 3, 3))
    exact: dict[str, Tensor] = {}
    for name in ("up", "head"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: (
                exact.update({name: y.detach()}) or exact.update({f"{name}.x": args[0]})
            )
        )
    model(ids, factor=2.0)
    corrected = gl.correct_bias(model, [ids], w=3, forward=lambda model, batch: model(batch, factor=2.0))
    assert corrected.words.weight is model.words.weight
    assert corrected.up.bias.shape == (6,)
    for name, dims in (("up", (0, 2, 3)), ("head", (0, 1, 2))):
        layer = corrected.get_submodule(name)
        layer._forward_hooks.clear()
        with gl.bits(corrected, w=3, a=None):
            shift = (layer(exact[f"{name}.x"]) - exact[name]).detach().mean(dims)
        torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-12)
