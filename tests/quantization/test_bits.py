"""Setting widths: accepted values, and restoring them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import named_quantizers
from tests.networks import NETWORKS, RESNET, VGG, Network


def calibrated(network: Network = VGG) -> nn.Module:
    model = gl.convert(network.make().eval())
    gl.calibrate(model, [network.batch()])
    return model


def widths(model: nn.Module) -> set[tuple[str, int | None]]:
    """Return the widths that there are, of weights, of activations and of the network's input."""
    weights = {("w", m.bits) for m in model.modules() if isinstance(m, WeightQuantizer)}
    sites = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    return weights | {("input" if m.is_input else "a", m.bits) for m in sites}


@pytest.mark.parametrize(("w", "a"), [(4, 3), (1, 1), (16, 16), (None, 8), (8, None), (None, None)])
def test_every_quantizer_gets_its_width(w: int | None, a: int | None) -> None:
    model = calibrated()
    gl.set_bits(model, w=w, a=a)
    assert widths(model) == {("w", w), ("a", a), ("input", None if a is None else max(a, 8))}
    assert model(VGG.batch()[0]).isfinite().all()


WRONG: list[tuple[Any, type[Exception]]] = [
    (0, ValueError),
    (-1, ValueError),
    (17, ValueError),
    (True, TypeError),
    (4.0, TypeError),
    ("4", TypeError),
]


@pytest.mark.parametrize(("value", "error"), WRONG)
@pytest.mark.parametrize("which", ["w", "a"])
def test_a_wrong_width_is_refused_and_changes_nothing(which: str, value: Any, error: type[Exception]) -> None:
    model = calibrated()
    gl.set_bits(model, w=5, a=6)
    arguments = {"w": 8, "a": 8, which: value}
    with pytest.raises(error, match=rf"{which} \(None for float\) must be .*from 1 to 16"):
        gl.set_bits(model, **arguments)
    with pytest.raises(error), gl.bits(model, **arguments):
        pass
    with pytest.raises(error):
        gl.sweep(model, lambda m: pytest.fail("evaluated"), [(8, 8), (arguments["w"], arguments["a"])])
    assert widths(model) == {("w", 5), ("a", 6), ("input", 8)}


def test_widths_are_restored_after_the_block_and_after_exceptions() -> None:
    model = calibrated()
    gl.set_bits(model, w=5, a=None)
    next(m for m in model.modules() if isinstance(m, WeightQuantizer)).bits = 7
    before = [m.bits for m in model.modules() if hasattr(m, "bits")]
    with gl.bits(model, w=4, a=4) as same:
        assert same is model
        with pytest.raises(KeyError), gl.bits(model, w=2, a=2):
            raise KeyError
        assert widths(model) == {("w", 4), ("a", 4), ("input", 8)}
    assert [m.bits for m in model.modules() if hasattr(m, "bits")] == before


def test_without_ranges_the_activations_are_named() -> None:
    model = gl.convert(VGG.make())
    with pytest.raises(RuntimeError, match=r"no activation range for .*3\.input.*gradl1_fast\.calibrate"):
        gl.set_bits(model, w=4, a=4)
    assert widths(model) == {("w", None), ("a", None), ("input", None)}
    gl.set_bits(model, w=4, a=None)
    layer = gl.QLinear(3, 3)
    layer.input_quantizer.bits = 4
    with pytest.raises(RuntimeError, match="no activation range for input: call"):
        layer(torch.ones(1, 3))


def test_a_model_without_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantizers: call"):
        gl.set_bits(VGG.make(), w=4, a=4)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
@pytest.mark.parametrize("per_channel", [False, True])
def test_wide_grids_are_close_to_float_and_narrow_ones_are_not(network: Network, per_channel: bool) -> None:
    model = gl.convert(network.make().eval(), per_channel=per_channel)
    gl.calibrate(model, [network.batch()])
    x = network.batch()[0]
    exact = model(x).detach()
    errors = {}
    for width in (16, 8, 2):
        with gl.bits(model, w=width, a=width):
            errors[width] = float((model(x).detach() - exact).norm() / exact.norm())
    assert errors[16] < 1e-3 < errors[8] < 0.1 < errors[2]


def test_evaluation_changes_neither_ranges_nor_statistics() -> None:
    model = calibrated(RESNET)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ranges = [name for name in before if name.endswith((".low", ".high"))]
    assert len(ranges) == 2 * len(named_quantizers(model))
    for w, a in ((None, None), (4, 4), (8, None)):
        with torch.no_grad(), gl.bits(model, w=w, a=a):
            model(100 * RESNET.batch()[0])
    assert before.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_widths_by_name_do_not_change_others() -> None:
    model = calibrated()
    gl.set_bits(model, w=8, a=8)
    with gl.bits(model, w={"3": 2, "12": None}, a={"3.input": 4}):
        layers = {name: model.get_submodule(name).weight_quantizer.bits for name in ("0", "3", "12")}
        assert layers == {"0": 8, "3": 2, "12": None}
        assert model.get_submodule("3.input_quantizer").bits == 4
        assert model.get_submodule("7.input_quantizer").bits == 8
    assert widths(model) == {("w", 8), ("a", 8), ("input", 8)}


BAD_NAMES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"w": {"1": 4}, "a": 8}, ValueError, r"w: unknown name '1'; the names are \['0', '3'"),
    ({"w": 4, "a": {"input": 4}}, ValueError, "a: unknown name 'input'"),
    ({"w": {"0": 17}, "a": None}, ValueError, r"w\['0'\] \(None for float\) must be from 1 to 16"),
    ({"w": {"0": True}, "a": None}, TypeError, r"w\['0'\].* must be an int"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_NAMES)
def test_wrong_names_and_widths_by_name_change_nothing(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = calibrated()
    gl.set_bits(model, w=5, a=6)
    with pytest.raises(error, match=message):
        gl.set_bits(model, **wrong)
    assert widths(model) == {("w", 5), ("a", 6), ("input", 8)}


def test_only_activations_that_are_to_be_quantized_need_a_range() -> None:
    model = gl.convert(VGG.make())
    name = "7.input"
    model.get_submodule("7.input_quantizer").set_range(torch.tensor(0.0), torch.tensor(1.0))
    gl.set_bits(model, w=None, a={name: 4, "3.input": None})
    with pytest.raises(RuntimeError, match=r"no activation range for 3\.input: call"):
        gl.set_bits(model, w=None, a={name: 4, "3.input": 4})


@pytest.mark.parametrize(
    ("a", "input_bits", "expected"),
    [(4, 8, 8), (4, 6, 6), (4, 2, 4), (10, 8, 10), (4, None, None), (None, 8, None)],
)
def test_the_network_input_keeps_more_bits(
    a: int | None, input_bits: int | None, expected: int | None
) -> None:
    model = calibrated(RESNET)
    with gl.bits(model, w=4, a=a, input_bits=input_bits):
        assert widths(model) == {("w", 4), ("a", a), ("input", expected)}
    gl.set_bits(model, w=4, a={"stem.0.input": 3})
    assert ("input", 3) in widths(model)
    with pytest.raises(ValueError, match=r"input_bits \(None for float\) must be from 1 to 16"):
        gl.set_bits(model, w=4, a=4, input_bits=0)


@pytest.mark.parametrize("input_bits", [4, None])
@pytest.mark.parametrize("a", [{}, {"0.input": 6}])
def test_input_bits_beside_widths_by_name_are_refused(a: dict[str, int], input_bits: int | None) -> None:
    model, x = calibrated(), VGG.batch()[0]
    with pytest.raises(ValueError, match=r"input_bits = .*: a is a mapping"):
        gl.set_bits(model, w=4, a=a, input_bits=input_bits)
    with pytest.raises(ValueError, match=r"input_bits = .*: a is a mapping"):
        gl.prepare(model, [x], w=4, a=a, input_bits=input_bits)
    assert widths(model) == {("w", None), ("a", None), ("input", None)}


class TwoHeads(nn.Module):
    """A head that evaluation does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).relu()
        return self.head(y) + self.aux(y.sigmoid()) if self.training else self.head(y)


def test_a_site_without_a_range_raises_when_it_is_used() -> None:
    model, x = gl.convert(TwoHeads()), torch.randn(5, 4)
    with pytest.warns(
        UserWarning, match=r"calibrate: no value reached aux\.input, so no range was set.*stays in float"
    ) as caught:
        gl.calibrate(model, [x])
    assert len(caught) == 1
    with gl.bits(model.eval(), w=4, a=4):
        assert model(x).isfinite().all()
        with pytest.raises(RuntimeError, match=r"no activation range for aux\.input: call"):
            model.train()(x)
    with pytest.raises(RuntimeError, match=r"no activation range for aux\.input: call"):
        gl.set_bits(model, w=4, a={"aux.input": 4})


def test_quantized_under_inference_mode() -> None:
    model, x = calibrated(), VGG.batch()[0]
    with gl.bits(model, w=4, a=4):
        expected = model(x).detach()
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
