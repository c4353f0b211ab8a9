"""The layers compared with their torch twins."""

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

TWINS = {
    **{gl.QConv1d: nn.Conv1d, gl.QConv2d: nn.Conv2d, gl.QConv3d: nn.Conv3d, gl.QLinear: nn.Linear},
    gl.QConvTranspose1d: nn.ConvTranspose1d,
    gl.QConvTranspose2d: nn.ConvTranspose2d,
    gl.QConvTranspose3d: nn.ConvTranspose3d,
}
CONVOLUTIONS = (gl.QConv1d, gl.QConv2d, gl.QConv3d)
TRANSPOSED = (gl.QConvTranspose1d, gl.QConvTranspose2d, gl.QConvTranspose3d)
MODES = ("zeros", "reflect", "replicate", "circular")
SHAPES = {
    **{gl.QConv1d: (2, 4, 7), gl.QConv2d: (2, 4, 7, 6), gl.QConv3d: (2, 4, 4, 5, 4), gl.QLinear: (2, 3, 4)},
    **{
        gl.QConvTranspose1d: (2, 4, 5),
        gl.QConvTranspose2d: (2, 4, 4, 3),
        gl.QConvTranspose3d: (2, 4, 3, 2, 2),
    },
}

CASES: list[tuple[type[QuantizedLayer], tuple[Any, ...], dict[str, Any]]] = [
    *[(layer, (4, 6, 3), {"padding": 1, "padding_mode": m}) for layer in CONVOLUTIONS for m in MODES],
    *[(gl.QConv2d, (4, 6, (3, 2)), {"padding": "same", "padding_mode": m}) for m in MODES],
    (gl.QConv1d, (4, 6, 3, 2), {"dilation": 2, "bias": False}),
    (gl.QConv2d, (4, 6, 3, 2, 1, 1, 2), {}),
    (gl.QConv2d, (4, 4, 3), {"groups": 4, "padding": "valid"}),
    (gl.QConv3d, (4, 2, 2), {"stride": (1, 2, 1)}),
    (gl.QLinear, (4, 3), {}),
    (gl.QLinear, (4, 3, False), {}),
    *[(layer, (4, 6, 3), {"stride": 2, "padding": 1}) for layer in TRANSPOSED],
    (gl.QConvTranspose2d, (4, 6, 3), {"groups": 2, "output_padding": (1, 0), "stride": 2, "bias": False}),
    (gl.QConvTranspose1d, (4, 4, 3), {"groups": 4, "dilation": 2}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__} {c[1]} {c[2]}")
Case = tuple[type[QuantizedLayer], tuple[Any, ...], dict[str, Any]]


def run(module: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = module(*leaves)
    return [y, *torch.autograd.grad(y.sin().sum(), [*leaves, *module.parameters()])]


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def armed(layer: QuantizedLayer) -> QuantizedLayer:
    layer.arming.set(0, True, True)
    return layer


@each_case
@pytest.mark.parametrize("is_armed", [False, True])
def test_outputs_and_gradients_equal_those_of_the_twin(case: Case, is_armed: bool) -> None:
    layer, args, kwargs = case
    twin = TWINS[layer](*args, **kwargs, dtype=torch.float64)
    ours = layer(*args, **kwargs, dtype=torch.float64)
    assert list(ours.state_dict()) == list(twin.state_dict())
    ours.load_state_dict(twin.state_dict(), strict=True)
    ours = armed(ours) if is_armed else ours
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
    ours = layer.from_float(twin, per_channel=True)
    assert all(getattr(ours, name) is parameter for name, parameter in twin.named_parameters())
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
    kind = inspect.Parameter
    assert kinds == [kind.VAR_POSITIONAL, kind.KEYWORD_ONLY, kind.VAR_KEYWORD]
    with pytest.raises(TypeError):
        layer(4, 3, 1, nonsense=True)


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("module", [Subclass(3, 3), nn.Conv2d(3, 3, 1), gl.QLinear(3, 3)])
def test_only_the_exact_twin_is_accepted(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="stands in for Linear exactly"):
        gl.QLinear.from_float(module)


def test_weights_per_channel_and_per_tensor() -> None:
    layers = [gl.QConv2d(2, 3, 3, per_channel=p).double() for p in (False, True)]
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
    assert "ActivationQuantizer(bits=None, range=None)" in text
    quantizer = ActivationQuantizer(is_input=True)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.5))
    assert repr(quantizer) == "ActivationQuantizer(bits=None, range=[0, 1.5], network input)"


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
def test_a_probe_is_moved_with_the_model_and_stays_a_leaf(move: str) -> None:
    function, dtype, device = MOVES[move]
    layer = gl.QConv2d(2, 3, 3)
    probe = function(layer).input_quantizer.probe
    assert (probe.dtype, probe.device.type, probe.shape) == (dtype, device, ())
    assert probe.is_leaf
    assert probe.requires_grad


def test_layers_can_be_created_on_meta() -> None:
    layer = gl.QConv2d(2, 3, 3, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(1, 2, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (1, 3, 3, 3)
    assert layer.input_quantizer.probe.is_meta


def test_a_tap_at_float_width_returns_its_input() -> None:
    quantizer, x = ActivationQuantizer(), random((3, 2))
    assert quantizer(x).data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert quantizer(x) is x


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "iadd": lambda y: y.add_(1),
    "relu_": torch.relu_,
    "mul_ of a part": lambda y: y[..., :2].mul_(2),
    "dropout": lambda y: nn.functional.dropout(y, 0.0, training=True, inplace=True),
}
GIVEN: list[tuple[type[QuantizedLayer], tuple[Any, ...], tuple[int, ...]]] = [
    *[(gl.QLinear, (8, 8), shape) for shape in ((2, 5, 8), (8,), (2, 8), (2, 3, 2, 8))],
    (gl.QConv1d, (4, 4, 3), (4, 7)),
    (gl.QConv2d, (4, 4, 1), (2, 4, 5, 5)),
    (gl.QConv2d, (4, 4, 3), (4, 5, 5)),
    (gl.QConvTranspose2d, (4, 4, 2), (4, 5, 5)),
]


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize(("layer", "args", "shape"), GIVEN, ids=str)
@pytest.mark.parametrize("is_armed", [False, True])
def test_the_result_of_a_layer_may_be_changed_in_place(
    change: str, layer: type[QuantizedLayer], args: tuple[Any, ...], shape: tuple[int, ...], is_armed: bool
) -> None:
    twin = TWINS[layer](*args, dtype=torch.float64)
    ours = layer.from_float(twin)
    ours = armed(ours) if is_armed else ours
    results = []
    for module in (ours, twin):
        x = random(shape).requires_grad_()
        y = module(x)
        IN_PLACE[change](y)
        gradients = torch.autograd.grad(y.sin().sum(), [x, module.weight], create_graph=True)
        total = torch.autograd.grad(sum(g.abs().sum() for g in gradients), [x, module.weight])
        results.append([y, *gradients, *total])
    assert_gradients(*results, 1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_embedding_equals_its_twin_and_is_quantized(per_channel: bool) -> None:
    twin = nn.Embedding(7, 4, padding_idx=2, dtype=torch.float64)
    ours, ids = gl.QEmbedding.from_float(twin, per_channel=per_channel), torch.tensor([[0, 2, 6]])
    assert torch.equal(ours(ids), twin(ids))
    ours.weight_quantizer.bits = 2
    assert len(ours(ids)[0, 0].unique()) <= 3
    assert ours.input_quantizer is None
    gradient = torch.autograd.grad(ours(ids).sum(), ours.weight)[0]
    assert torch.equal(gradient[2], torch.zeros(4))


def test_a_transposed_convolution_accepts_an_output_size() -> None:
    twin = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, dtype=torch.float64)
    for ours in (gl.QConvTranspose2d.from_float(twin), armed(gl.QConvTranspose2d.from_float(twin))):
        for size in ((7, 9), (8, 10)):
            assert_gradients([ours(random((2, 4, 4, 5)), size)], [twin(random((2, 4, 4, 5)), size)], 1e-12)
