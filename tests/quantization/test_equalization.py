"""Equalization keeps the float function and matches channel ranges; unsupported layers are unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import MOBILENET, NO_NORM, RESNET, VGG, Network, conv_norm


def unbalanced(network: Network) -> nn.Module:
    """Return a folded model whose channels have very different ranges."""
    model = network.make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight *= torch.logspace(-2, 1, module.num_features, dtype=torch.float64)
    converted = gl.convert(model)
    gl.calibrate(converted, [network.batch()])
    return gl.fold_batch_norm(converted).model


PAIRS = {
    "vgg": [("0", "3"), ("3", "7"), ("7", "12"), ("12", "14")],
    "no norm": [("0", "2"), ("2", "5"), ("5", "7")],
    "resnet18": [(f"blocks.{i}.conv1", f"blocks.{i}.conv2") for i in range(8)],
}


@pytest.mark.parametrize("network", [VGG, NO_NORM, RESNET], ids=lambda n: n.id)
def test_the_float_function_is_unchanged_and_the_ranges_match(network: Network) -> None:
    model = unbalanced(network)
    x = network.batch()[0]
    result = gl.equalize(model)
    assert result.pairs == PAIRS[network.id]
    exact = model(x).detach()
    torch.testing.assert_close(result.model(x).detach(), exact, rtol=1e-10, atol=1e-10)
    for first, second in result.pairs:
        a = result.model.get_submodule(first).weight.detach().abs().flatten(1).amax(1)
        b = result.model.get_submodule(second).weight.detach().abs().transpose(0, 1).flatten(1).amax(1)
        b = b.reshape(len(a), -1).amax(1)
        torch.testing.assert_close(a, b, rtol=5e-3, atol=0)


def test_scale_that_was_moved_by_hand_is_moved_back() -> None:
    plain, moved = NO_NORM.make(), NO_NORM.make()
    with torch.no_grad():
        s = torch.logspace(-2, 1, 4, dtype=torch.float64)
        moved[0].weight *= s.reshape(-1, 1, 1, 1)
        moved[0].bias *= s
        moved[2].weight /= s.reshape(1, -1, 1, 1)
    x = NO_NORM.batch()[0]
    models = [gl.convert(m) for m in (plain, moved)]
    models += [gl.equalize(m).model for m in models]
    for name in ("0", "2", "5", "7"):
        a, b = (m.get_submodule(name).weight.detach() for m in models[2:])
        torch.testing.assert_close(a, b, rtol=1e-2, atol=0)
    errors = []
    for model in models[1:]:
        exact = model(x).detach()
        with gl.bits(model, w=4, a={}):
            errors.append(float((model(x).detach() - exact).norm() / exact.norm()))
    assert max(errors[1:]) < 0.5 * errors[0]


def test_ranges_in_between_are_dropped_and_others_stay() -> None:
    model = unbalanced(RESNET)
    gl.calibrate_weights(model)
    result = gl.equalize(model)
    assert result.uncalibrated == [f"blocks.{i}.conv2.input" for i in range(8)]
    assert set(result.without_range) == {name for pair in result.pairs for name in pair}
    assert result.model.get_submodule("blocks.0.conv1").input_quantizer.low is not None
    assert model.get_submodule("blocks.0.conv2").input_quantizer.low is not None
    with (
        gl.bits(result.model, w=4, a=4),
        pytest.raises(RuntimeError, match=r"no activation range for blocks\.0\.conv2"),
    ):
        result.model(RESNET.batch()[0])
    gl.calibrate(result.model, [RESNET.batch()])
    with gl.bits(result.model, w=8, a=8):
        assert result.model(RESNET.batch()[0]).isfinite().all()
    assert "blocks.0.conv1 and blocks.0.conv2: equalized" in str(result)
    assert "calibrate again" in str(result)
    assert "stored weight range was dropped" in str(result)


def test_depthwise_convolutions_take_part() -> None:
    layers = [*conv_norm(3, 4), nn.ReLU(), *conv_norm(4, 8, groups=4), nn.ReLU(), *conv_norm(8, 5, 1)]
    plain = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        plain[1].weight.copy_(torch.logspace(-2, 1, 4))
    folded = gl.fold_batch_norm(gl.convert(plain)).model
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = gl.equalize(folded)
    assert result.pairs == [("0", "3"), ("3", "6")]
    torch.testing.assert_close(result.model(x), folded(x), rtol=1e-10, atol=1e-12)


def test_dead_channels_stay_dead() -> None:
    plain = NO_NORM.make()
    with torch.no_grad():
        plain[0].weight[1] = 0.0
        plain[2].weight[:, 2] = 0.0
    model = gl.convert(plain)
    result = gl.equalize(model)
    x = NO_NORM.batch()[0]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)
    assert all(p.isfinite().all() for p in result.model.parameters())


def test_the_model_is_not_changed_and_low_precision_is_kept() -> None:
    model = gl.convert(NO_NORM.make(torch.float32))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = gl.equalize(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.model.state_dict().keys() == before.keys()


class Chain(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], second: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.between = nn.Conv2d(3, 4, 1), between
        self.b = second or nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Fork(nn.Module):
    """Two layers read what the first makes: scale would have to move into both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) + self.c(y)


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + F.conv2d(x, self.a.weight).mean()


LEFT: dict[str, Callable[[], nn.Module]] = {
    "ReLU6": lambda: Chain(F.relu6),
    "sigmoid": lambda: Chain(torch.sigmoid),
    "sum": lambda: Chain(lambda y: F.relu(y) + y),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    "another layer": lambda: Fork(),
    "a weight by function": lambda: ByFunction(),
    "transposed": lambda: Chain(F.relu, nn.ConvTranspose2d(4, 2, 1)),
    "groups": lambda: Chain(F.relu, nn.Conv2d(4, 2, 1, groups=2)),
    "one layer": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
}


@pytest.mark.parametrize("case", LEFT)
def test_layers_that_scale_cannot_pass_are_not_changed(case: str) -> None:
    result = gl.equalize(gl.convert(LEFT[case]().eval()))
    assert result.pairs == []
    assert str(result) == "no two layers to equalize"


def test_mobilenet_has_relu6_everywhere() -> None:
    assert gl.equalize(unbalanced(MOBILENET)).pairs == []


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.sum() < 1e9 else x + 1)


def test_parts_of_a_model_are_equalized() -> None:
    model, x = gl.convert(Parts().double().eval()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = gl.equalize(model)
    assert result.pairs == [("body.0", "body.2")]
    assert type(result.model) is Parts
    assert not torch.equal(result.model.body[0].weight, model.body[0].weight)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_model_without_traceable_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="equalize: the model must be converted"):
        gl.equalize(gl.convert(nn.Linear(3, 2)))
