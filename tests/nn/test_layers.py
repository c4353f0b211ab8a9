"""The modules against their torch twins."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer, QuantizedLayer
from tests.gradients import assert_gradients

TWINS = {gl.QConv1d: nn.Conv1d, gl.QConv2d: nn.Conv2d, gl.QConv3d: nn.Conv3d, gl.QLinear: nn.Linear}
MODES = ("zeros", "reflect", "replicate", "circular")
SHAPES = {gl.QConv1d: (2, 4, 7), gl.QConv2d: (2, 4, 7, 6), gl.QConv3d: (2, 4, 4, 5, 4), gl.QLinear: (2, 3, 4)}

CASES: list[tuple[type[QuantizedLayer], tuple[Any, ...], dict[str, Any]]] = [
    *[(layer, (4, 6, 3), {"padding": 1, "padding_mode": m}) for layer in list(TWINS)[:3] for m in MODES],
    *[(gl.QConv2d, (4, 6, (3, 2)), {"padding": "same", "padding_mode": m}) for m in MODES],
    (gl.QConv1d, (4, 6, 3, 2), {"dilation": 2, "bias": False}),
    (gl.QConv2d, (4, 6, 3, 2, 1, 1, 2), {}),
    (gl.QConv2d, (4, 4, 3), {"groups": 4, "padding": "valid"}),
    (gl.QConv3d, (4, 2, 2), {"stride": (1, 2, 1)}),
    (gl.QLinear, (4, 3), {}),
    (gl.QLinear, (4, 3, False), {}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__} {c[1]} {c[2]}")
Case = tuple[type[QuantizedLayer], tuple[Any, ...], dict[str, Any]]


def run(module: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = module(*leaves)
    return [y, *torch.autograd.grad(y.sin().sum(), [*leaves, *module.parameters()])]


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@each_case
def test_outputs_and_gradients_equal_the_twins(case: Case) -> None:
    layer, args, kwargs = case
    twin = TWINS[layer](*args, **kwargs, dtype=torch.float64)
    ours = layer(*args, **kwargs, dtype=torch.float64)
    assert list(ours.state_dict()) == list(twin.state_dict())
    ours.load_state_dict(twin.state_dict(), strict=True)
    assert_gradients(run(ours, random(SHAPES[layer])), run(twin, random(SHAPES[layer])), 1e-12)
    again = TWINS[layer](*args, **kwargs, dtype=torch.float64)
    again.load_state_dict(ours.state_dict(), strict=True)


@each_case
def test_round_trip_through_the_twin(case: Case) -> None:
    layer, args, kwargs = case
    twin = TWINS[layer](*args, **kwargs).eval()
    calls: list[str] = []
    twin.register_forward_hook(lambda module, i, out: calls.append(type(module).__name__))
    twin.extra = "kept"
    before = str(twin)
    ours = layer.from_float(twin, per_channel=True, quantize_input=False)
    assert ours.weight is twin.weight
    assert ours.bias is twin.bias
    assert not any(m.training for m in ours.modules())
    back = ours.to_float()
    assert type(back) is TWINS[layer]
    assert str(back) == str(twin) == before
    assert back.__dict__.keys() == twin.__dict__.keys()
    for module in (twin, ours, back):
        module(random(SHAPES[layer]).float())
    assert calls == [TWINS[layer].__name__, layer.__name__, TWINS[layer].__name__]


@pytest.mark.parametrize("layer", TWINS, ids=lambda c: c.__name__)
def test_the_twin_s_arguments_come_first_and_others_by_keyword(layer: type[QuantizedLayer]) -> None:
    kinds = [p.kind for p in inspect.signature(layer).parameters.values()]
    assert kinds == [
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ]
    with pytest.raises(TypeError):
        layer(4, 3, 1, nonsense=True)


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("module", [Subclass(3, 3), nn.Conv2d(3, 3, 1), gl.QLinear(3, 3)])
def test_only_the_exact_twin_is_taken(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="stands in for Linear exactly"):
        gl.QLinear.from_float(module)


def test_weights_per_channel_and_per_tensor() -> None:
    layers = [gl.QConv2d(2, 3, 3, per_channel=p, quantize_input=False).double() for p in (False, True)]
    with torch.no_grad():
        layers[0].weight.mul_(torch.tensor([1, 10, 100]).view(3, 1, 1, 1))
        layers[1].weight.copy_(layers[0].weight)
    for layer, scale in zip(
        layers,
        (layers[0].weight.abs().max() / 7, layers[0].weight.abs().amax((1, 2, 3), keepdim=True) / 7),
        strict=True,
    ):
        layer.weight_quantizer.bits = 4
        torch.testing.assert_close(
            layer.weight_quantizer(layer.weight), (layer.weight / scale).round() * scale, rtol=1e-12, atol=0
        )


def test_repr_shows_the_quantizers() -> None:
    text = repr(gl.QConv2d(2, 3, 3, per_channel=True))
    assert text.startswith("QConv2d(\n  2, 3, kernel_size=(3, 3), stride=(1, 1)")
    assert "WeightQuantizer(bits=None, per_channel=True, range=own)" in text
    assert "ActivationQuantizer(bits=None, range=None, penalized=True)" in text
    norm = gl.BatchNormAct2d(3, activation="relu", quantize_output=True)
    norm.quantizer.set_range(torch.tensor(0.0), torch.tensor(1.5))
    assert "activation=relu" in repr(norm)
    assert "range=[0, 1.5]" in repr(norm)


MOVES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype, str]] = {
    "half": (lambda m: m.half(), torch.float32, "cpu"),
    "bfloat16": (lambda m: m.to(torch.bfloat16), torch.float32, "cpu"),
    "double": (lambda m: m.double(), torch.float64, "cpu"),
    "double and back": (lambda m: m.double().float(), torch.float32, "cpu"),
    "meta": (lambda m: m.to("meta"), torch.float32, "meta"),
    "deepcopy": (copy.deepcopy, torch.float32, "cpu"),
    "to_empty": (lambda m: m.to("meta").to_empty(device="cpu"), torch.float32, "cpu"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("asked", [False, True])
def test_a_probe_moves_along_and_stays_a_leaf(move: str, asked: bool) -> None:
    function, dtype, device = MOVES[move]
    layer = gl.QConv2d(2, 3, 3)
    layer.input_quantizer.probe.requires_grad_(asked)
    probe = function(layer).input_quantizer.probe
    assert (probe.dtype, probe.device.type, probe.shape) == (dtype, device, ())
    assert probe.is_leaf
    assert probe.requires_grad == asked


def test_layers_can_be_made_on_meta() -> None:
    layer = gl.QConv2d(2, 3, 3, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(1, 2, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (1, 3, 3, 3)
    assert layer.input_quantizer.probe.is_meta
    norm = gl.BatchNormAct2d(2, device="meta", quantize_output=True)
    assert norm.quantizer.probe.is_meta


NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cumulative average": {"momentum": None},
    "fast": {"momentum": 0.9, "eps": 0.1},
    "no statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
}
ACTIVATIONS = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}


class Reference(nn.Module):
    def __init__(self, norm: nn.Module, activation: str) -> None:
        super().__init__()
        self.norm, self.activation = norm, ACTIVATIONS[activation]

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        return self.activation(sum(residual, self.norm(x)))


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residuals", [0, 1])
def test_batch_norm_equals_the_twin(options: str, activation: str, training: bool, residuals: int) -> None:
    twin = nn.BatchNorm2d(4, **NORMS[options], dtype=torch.float64).train(training)
    ours = gl.BatchNormAct2d.from_float(copy.deepcopy(twin), activation=activation, quantize_output=True)
    assert list(ours.state_dict()) == list(twin.state_dict())
    inputs = [random((3, 4, 5, 2)) * 4, random((3, 4, 5, 2)).flip(0)][: 1 + residuals]
    for _ in range(3):
        assert_gradients(run(ours, *inputs), run(Reference(twin, activation), *inputs), 1e-12)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", NORMS)
def test_batch_norm_round_trip(options: str) -> None:
    twin = nn.BatchNorm2d(4, **NORMS[options]).eval()
    ours = gl.BatchNormAct2d.from_float(twin, activation="relu", quantize_output=True)
    assert ours.weight is twin.weight
    assert ours.running_mean is twin.running_mean
    back = ours.to_float()
    assert type(back) is nn.BatchNorm2d
    assert str(back) == str(twin)
    assert back.__dict__.keys() == twin.__dict__.keys()
    made = gl.BatchNormAct2d(4, **NORMS[options], activation="relu6")
    made.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(made.state_dict(), strict=True)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be one of none, relu, relu6"):
        gl.BatchNormAct2d(3, activation="gelu")


def test_one_value_per_channel_in_training_is_pytorchs_own_error() -> None:
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value") as theirs:
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError, match="more than 1 value") as error:
        gl.BatchNormAct2d(3)(x)
    assert str(error.value) == str(theirs.value)
    with pytest.raises(ValueError, match="expected 4D input"):
        gl.BatchNormAct2d(3)(x[0])


def test_a_tap_at_float_width_returns_its_input() -> None:
    quantizer, x = ActivationQuantizer(), random((3, 2))
    assert quantizer(x).data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert quantizer(x) is x
