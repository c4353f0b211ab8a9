"""Activation ranges: found by hand as well, kept where data is bad, refused where they are none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer
from tests.networks import RESNET, VGG, Network


def ranges(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    return {n: (m.low, m.high) for n, m in found.items()}


def batches(network: Network) -> list[Tensor]:
    x = network.batch()[0]
    return [x, 2 * x.flip(0), -x]


@pytest.mark.parametrize("network", [VGG, RESNET], ids=lambda n: n.id)
def test_ranges_are_the_extremes_over_all_batches(network: Network) -> None:
    plain = network.make().train()
    model = gl.convert(plain)
    gl.calibrate(model, batches(network))
    seen: dict[str, list[Tensor]] = {name: [] for name in network.producers}
    for name, values in seen.items():
        hook = lambda _, args, out, values=values: values.append(out)  # noqa: E731
        plain.get_submodule(name).register_forward_hook(hook)
    plain.eval()
    for x in batches(network):
        plain(x)
    expected = [(float(torch.cat(v).min()), float(torch.cat(v).max())) for v in seen.values()]
    expected.append((float(torch.cat(batches(network)).min()), float(torch.cat(batches(network)).max())))
    actual = [(float(low), float(high)) for low, high in ranges(model).values()]
    torch.testing.assert_close(sorted(actual), sorted(expected), rtol=1e-12, atol=0)


def test_statistics_modes_and_widths_stay() -> None:
    model = gl.convert(VGG.make().train())
    model.get_submodule("4").eval()
    gl.set_bits(model, w=4, a=None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    gl.calibrate(model, batches(VGG))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert {m.bits for m in model.modules() if hasattr(m, "axis")} == {4}
    assert all(m.observer is None for m in model.modules() if isinstance(m, ActivationQuantizer))


def generator() -> Iterator[Tensor]:
    yield from batches(VGG)


FORMS: dict[str, Any] = {
    "generator": generator,
    "pairs": lambda: [(x, 0) for x in batches(VGG)],
    "lists": lambda: [[x] for x in batches(VGG)],
    "loader": lambda: torch.utils.data.DataLoader(torch.cat(batches(VGG)), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_in_every_form(form: str) -> None:
    expected, model = (gl.convert(VGG.make()) for _ in range(2))
    gl.calibrate(expected, batches(VGG))
    gl.calibrate(model, FORMS[form]())
    assert ranges(model) == ranges(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_data_that_is_not_finite_is_refused_by_name_and_the_old_ranges_stay(value: float) -> None:
    model = gl.convert(VGG.make())
    gl.calibrate(model, batches(VGG))
    before = ranges(model)
    bad = batches(VGG)
    bad[1][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"calibrate: the values at '.*' go from .*NaN and infinity"):
        gl.calibrate(model, bad)
    assert ranges(model) == before


def test_a_layer_that_makes_nan_is_named() -> None:
    model = VGG.make()
    with torch.no_grad():
        model[4].weight[0] = float("nan")
    converted = gl.convert(model)
    with pytest.raises(ValueError, match=re.escape("'activation_quantizers._6'")):
        gl.calibrate(converted, batches(VGG))
    assert set(ranges(converted).values()) == {(None, None)}


@pytest.mark.parametrize("name", ["percentile", "mse", "standard_deviation", "moving_average"])
def test_every_method_names_the_quantizer_of_a_bad_value(name: str) -> None:
    model = gl.convert(VGG.make())
    bad = batches(VGG)
    bad[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibrate: the values at '.*' go from .*NaN and infinity"):
        gl.calibrate(model, bad, ranges=name)
    assert set(ranges(model).values()) == {(None, None)}


@pytest.mark.parametrize(
    "method", ["percentile", gl.ranges.StandardDeviation(1.5), gl.ranges.MovingAverage(0.5)]
)
def test_each_quantizer_gets_the_range_of_its_own_values(method: Any) -> None:
    model = gl.convert(VGG.make().eval())
    seen: list[Tensor] = []
    quantizer = model.get_submodule("1.quantizer")
    model.get_submodule("1").register_forward_hook(lambda _, args, y: seen.append(y.detach()))
    gl.calibrate(model, batches(VGG), ranges=method)
    expected = (
        gl.ranges.Percentile()
        if isinstance(method, str)
        else type(method)(*{1.5, 0.5} & set(vars(method).values()))
    )
    for x in seen:
        expected.update(x.reshape(1, -1))
    assert (quantizer.low, quantizer.high) == tuple(end.squeeze() for end in expected.ends())
    assert len(set(ranges(model).values())) == len(ranges(model))


def test_the_best_range_depends_on_the_width_and_bits_takes_it() -> None:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, batches(VGG), ranges="mse")
    quantizer = model.get_submodule("1.quantizer")
    assert quantizer.high.shape == (16,)
    assert quantizer.high[2] < quantizer.high[7]
    x = torch.linspace(0, 2 * float(quantizer.high.max()), 100, dtype=torch.float64)
    for a in (3, 8):
        with gl.bits(model, w=None, a=a):
            assert float(quantizer(x).max()) == pytest.approx(float(quantizer.high[a - 1]))
            assert f"{float(quantizer.high[a - 1]):.4g}]" in repr(quantizer)


def test_data_and_their_absence_are_refused_where_they_do_not_fit() -> None:
    model = gl.convert(VGG.make())
    with pytest.raises(ValueError, match="need no data; leave batches out"):
        gl.calibrate(model, batches(VGG), ranges="batch_norm")
    with pytest.raises(ValueError, match="give batches, or ranges='batch_norm'"):
        gl.calibrate(model)


def test_no_batches_are_refused() -> None:
    model = gl.convert(VGG.make())
    used = generator()
    list(used)
    for empty in ([], used):
        with pytest.raises(ValueError, match="got no batches; an iterator that was used before is empty"):
            gl.calibrate(model, empty)


def test_a_tensor_is_not_taken_for_its_rows() -> None:
    model = gl.convert(VGG.make())
    with pytest.raises(TypeError, match=r"calibrate: batches is a tensor of shape \(.*\); put it in a list"):
        gl.calibrate(model, batches(VGG)[0])


def test_an_exception_while_running_leaves_everything_as_it_was() -> None:
    model = gl.convert(VGG.make())
    gl.calibrate(model, batches(VGG))
    before, modes = ranges(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        gl.calibrate(model, [batches(VGG)[0], torch.ones(1, 2, 3, 4)])
    assert ranges(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(m.observer is None for m in model.modules() if isinstance(m, ActivationQuantizer))


def test_a_quantizer_that_no_value_reaches_is_named() -> None:
    model = nn.Module()
    model.used, model.spare = gl.QLinear(3, 3), gl.QLinear(3, 3)
    model.forward = model.used.forward
    with pytest.raises(RuntimeError, match=r"no value reached the quantizer 'spare\.input_quantizer'"):
        gl.calibrate(model, [torch.ones(2, 3)])


def test_a_model_without_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="no activation quantizers"):
        gl.calibrate(VGG.make(), batches(VGG))


RANGES = {
    "inverted": (1.0, -1.0, "inverted"),
    "NaN": (float("nan"), 1.0, "NaN and infinity make no range"),
    "infinite": (0.0, float("inf"), "NaN and infinity make no range"),
    "two values": ([0.0, 0.0], 1.0, "two single ends"),
}


@pytest.mark.parametrize("case", RANGES)
def test_a_range_that_is_none_is_refused(case: str) -> None:
    low, high, message = RANGES[case]
    quantizer = ActivationQuantizer()
    quantizer.set_range(torch.tensor(-1.0), torch.tensor([2.0]))
    with pytest.raises(ValueError, match=message):
        quantizer.set_range(torch.tensor(low), torch.tensor(high))
    assert (float(quantizer.low), float(quantizer.high)) == (-1.0, 2.0)
    assert quantizer.high.shape == ()


ODD = {"zero": (0.0, 0.0), "denormal": (0.0, 1e-42), "above zero": (1.0, 3.0), "below zero": (-3.0, -1.0)}


@pytest.mark.parametrize("case", ODD)
def test_zero_is_exact_in_every_range(case: str) -> None:
    quantizer = ActivationQuantizer()
    quantizer.set_range(*map(torch.tensor, ODD[case]))
    quantizer.bits = 4
    y = quantizer(torch.tensor([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf")]))
    assert not y[:2].any()
    assert y[4].isnan()
    assert y[[0, 1, 2, 3, 5]].isfinite().all()
