"""A second conversion converts new layers and keeps existing ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import QuantizedLayer
from tests.conversion.runs import assert_equal_steps, loss_of
from tests.conversion.small import TWO_BLOCKS
from tests.networks import VGG


def new_head(model: nn.Module) -> None:
    model.fc = nn.Linear(model.fc.in_features, 3).double()


def new_block(model: nn.Module) -> None:
    model.blocks.append(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()).double())


def wrapped_head(model: nn.Module) -> None:
    model.fc = nn.Sequential(model.fc, nn.ReLU(), nn.Linear(5, 2).double())


CHANGES: dict[str, Callable[[nn.Module], None]] = {f.__name__: f for f in (new_head, new_block, wrapped_head)}
each_change = pytest.mark.parametrize("change", CHANGES)


def changed(change: str, model: nn.Module) -> nn.Module:
    torch.manual_seed(11)
    CHANGES[change](model)
    return model


def plain_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]


@each_change
def test_new_layers_are_converted_and_penalised(change: str) -> None:
    model = changed(change, gl.convert(TWO_BLOCKS.make()))
    assert plain_layers(model)
    again = gl.convert(model)
    assert not plain_layers(again)
    x = TWO_BLOCKS.batch()[0]
    assert_equal_steps(changed(change, TWO_BLOCKS.make()), again, loss_of(x))


def penalised(model: nn.Module) -> None:
    gl.GradL1(model, 0.1, 0.1)


def calibrated(model: nn.Module) -> None:
    gl.calibrate(model, [TWO_BLOCKS.batch()[0]])


@each_change
@pytest.mark.parametrize("use", [penalised, calibrated])
def test_a_new_layer_in_float_is_named_once(change: str, use: Callable[[nn.Module], None]) -> None:
    model = changed(change, gl.convert(TWO_BLOCKS.make()))
    (name,) = plain_layers(model)
    with pytest.warns(UserWarning, match=rf"{name} was added .* call gradl1_fast\.convert") as caught:
        use(model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* was added after")
        use(model)
        use(gl.convert(model))


def test_layers_that_are_in_float_on_purpose_give_no_warning() -> None:
    plain = TWO_BLOCKS.make()
    plain.stem[0].forward = plain.stem[0].forward
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* was added after")
        model = gl.convert(plain)
        penalised(model)
        model.fc = plain.fc
        calibrated(model)
        part = nn.Sequential(gl.convert(TWO_BLOCKS.make()), nn.Linear(5, 2).double())
        penalised(part)


@each_change
def test_existing_layers_keep_quantizers_ranges_and_widths(change: str) -> None:
    model = gl.convert(TWO_BLOCKS.make())
    gl.calibrate(model, [TWO_BLOCKS.batch()[0]])
    gl.set_bits(model, w=4, a=6)
    changed(change, model)
    again = gl.convert(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            kept = again.get_submodule(name)
            assert kept.weight_quantizer.bits == layer.weight_quantizer.bits == 4
            assert kept.input_quantizer.bits == layer.input_quantizer.bits
            assert kept.input_quantizer.low is layer.input_quantizer.low
            assert kept.input_quantizer.is_input == layer.input_quantizer.is_input
    assert again.stem[0].input_quantizer.low is not None


@each_change
def test_one_penalty_arms_old_and_new_layers(change: str) -> None:
    again = gl.convert(changed(change, gl.convert(TWO_BLOCKS.make())))
    assert len({id(m.arming) for m in again.modules() if isinstance(m, QuantizedLayer)}) == 1


def test_a_new_layer_may_be_per_channel() -> None:
    model = gl.convert(VGG.make())
    model.append(nn.Linear(5, 2).double())
    again = gl.convert(model, per_channel=True)
    assert again[0].weight_quantizer.axis is None
    assert again[-1].weight_quantizer.axis == 0


def test_per_channel_without_a_new_layer_is_not_ignored_in_silence() -> None:
    model = gl.convert(VGG.make())
    with pytest.warns(UserWarning, match="converted with one range per tensor, and per_channel=True applies"):
        assert gl.convert(model, per_channel=True) is model
    per_channel = gl.convert(VGG.make(), per_channel=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.convert(per_channel, per_channel=True)
        gl.convert(model)


def test_separately_converted_parts_become_one_model() -> None:
    def body() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()

    def head() -> nn.Module:
        torch.manual_seed(6)
        return nn.Linear(3, 2).double()

    whole = gl.convert(nn.Sequential(gl.convert(body()), head()))
    assert not plain_layers(whole)
    x = torch.randn(4, 3).double()
    assert_equal_steps(nn.Sequential(body(), head()), whole, loss_of(x))


def test_the_first_conversion_is_not_affected() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = gl.convert(Model())
    model.fc2 = nn.Linear(3, 3)
    again = gl.convert(model)
    assert type(model.fc2) is nn.Linear
    assert type(again.fc2) is gl.QLinear
    assert again.fc2.weight is model.fc2.weight
