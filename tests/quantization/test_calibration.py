"""Activation ranges: compared with manual results, kept for bad data, refused if invalid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer
from tests.networks import RESNET, VGG, Network, layers


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
    seen: dict[str, list[Tensor]] = {name: [] for name in layers(plain)}
    for name, values in seen.items():
        hook = lambda _, args, values=values: values.append(args[0].detach())  # noqa: E731
        plain.get_submodule(name).register_forward_pre_hook(hook)
    plain.eval()
    for x in batches(network):
        plain(x)
    for name, inputs in seen.items():
        quantizer = model.get_submodule(name).input_quantizer
        expected = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
        assert (float(quantizer.low), float(quantizer.high)) == pytest.approx(expected, rel=1e-12)
    first = model.get_submodule(layers(plain)[0]).input_quantizer
    assert [q for q in model.modules() if getattr(q, "is_input", False)] == [first]


def test_statistics_modes_and_widths_are_not_changed() -> None:
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
def test_non_finite_data_are_refused_by_name_and_the_old_ranges_are_kept(value: float) -> None:
    model = gl.convert(VGG.make())
    gl.calibrate(model, batches(VGG))
    before = ranges(model)
    bad = batches(VGG)
    bad[1][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"calibrate: the values at '.*' range from .*must be finite"):
        gl.calibrate(model, bad)
    assert ranges(model) == before


def test_a_layer_that_makes_nan_is_named() -> None:
    model = VGG.make()
    with torch.no_grad():
        model[4].weight[0] = float("nan")
    converted = gl.convert(model)
    with pytest.raises(ValueError, match=re.escape("'7.input'")):
        gl.calibrate(converted, batches(VGG))
    assert set(ranges(converted).values()) == {(None, None)}


@pytest.mark.parametrize("name", ["percentile", "mse", "standard_deviation", "moving_average"])
def test_every_method_names_the_quantizer_of_a_bad_value(name: str) -> None:
    model = gl.convert(VGG.make())
    bad = batches(VGG)
    bad[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibrate: the values at '.*' range from .*must be finite"):
        gl.calibrate(model, bad, ranges=name)
    assert set(ranges(model).values()) == {(None, None)}


@pytest.mark.parametrize(
    "method", ["percentile", gl.ranges.StandardDeviation(1.5), gl.ranges.MovingAverage(0.5)]
)
def test_each_quantizer_gets_the_range_of_its_own_values(method: Any) -> None:
    model = gl.convert(VGG.make().eval())
    seen: list[Tensor] = []
    quantizer = model.get_submodule("3.input_quantizer")
    model.get_submodule("3").register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
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
    quantizer = model.get_submodule("3.input_quantizer")
    assert quantizer.high.shape == (16,)
    assert quantizer.high[2] < quantizer.high[7]
    x = torch.linspace(0, 2 * float(quantizer.high.max()), 100, dtype=torch.float64)
    for a in (3, 8):
        with gl.bits(model, w=None, a=a):
            assert float(quantizer(x).max()) == pytest.approx(float(quantizer.high[a - 1]))
            assert f"{float(quantizer.high[a - 1]):.4g}]" in repr(quantizer)


def test_data_and_their_absence_are_refused_where_they_do_not_fit() -> None:
    model = gl.convert(VGG.make())
    with pytest.raises(ValueError, match="uses no data; do not pass batches"):
        gl.calibrate(model, batches(VGG), ranges="batch_norm")
    with pytest.raises(ValueError, match="pass batches, or use ranges='batch_norm'"):
        gl.calibrate(model)


def test_no_batches_are_refused() -> None:
    model = gl.convert(VGG.make())
    used = generator()
    list(used)
    for empty in ([], used):
        with pytest.raises(ValueError, match="got no batches"):
            gl.calibrate(model, empty)


def test_a_single_tensor_is_not_treated_as_batches() -> None:
    model = gl.convert(VGG.make())
    with pytest.raises(TypeError, match=r"calibrate: batches is a tensor of shape \(.*\); put it in a list"):
        gl.calibrate(model, batches(VGG)[0])


def test_an_exception_while_running_restores_everything() -> None:
    model = gl.convert(VGG.make())
    gl.calibrate(model, batches(VGG))
    before, modes = ranges(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        gl.calibrate(model, [batches(VGG)[0], torch.ones(1, 2, 3, 4)])
    assert ranges(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(m.observer is None for m in model.modules() if isinstance(m, ActivationQuantizer))


def test_sites_that_no_value_reaches_are_named_and_lose_their_range() -> None:
    model = nn.Module()
    model.used, model.spare, model.other = (gl.QLinear(3, 3) for _ in range(3))
    model.forward = lambda x: model.used(x)
    model.spare.input_quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
    with pytest.warns(
        UserWarning, match=r"no value reached spare\.input, other\.input, so no range was set"
    ) as caught:
        gl.calibrate(model, [torch.ones(2, 3)])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert model.spare.input_quantizer.low is None
    assert model.used.input_quantizer.low is not None


def test_a_model_without_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="no activation quantizers"):
        gl.calibrate(VGG.make(), batches(VGG))


RANGES = {
    "inverted": (1.0, -1.0, "inverted"),
    "NaN": (float("nan"), 1.0, "the ends of a range must be finite"),
    "infinite": (0.0, float("inf"), "the ends of a range must be finite"),
    "two values": ([0.0, 0.0], 1.0, "must each have 1 value"),
}


@pytest.mark.parametrize("case", RANGES)
def test_an_invalid_range_is_refused(case: str) -> None:
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


class Several(nn.Module):
    """A forward pass that depends on its values, with inputs by name, that no trace can show."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.rest = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        if left.sum() > 1e9:
            left = left + 1
        y = self.q(left) * self.k(left) * scale
        return self.rest(y if right is None else y + self.q(right))


LEFT, RIGHT = torch.randn(5, 4), torch.randn(5, 4)
CALLS: dict[str, tuple[Any, Any]] = {
    "mapping": ({"left": LEFT, "right": RIGHT, "scale": 2.0}, None),
    "several in order": ((LEFT, RIGHT), lambda model, batch: model(*batch)),
    "keyword arguments": (
        {"x": LEFT, "y": [RIGHT]},
        lambda model, batch: model(batch["x"], right=batch["y"][0], scale=2.0),
    ),
    "a method": ((LEFT, RIGHT), lambda model, batch: model.forward(*batch)),
    "first entry": ((LEFT, "labels"), None),
}


@pytest.mark.parametrize("case", CALLS)
def test_models_are_called_with_their_own_signature(case: str) -> None:
    batch, forward = CALLS[case]
    model = gl.convert(Several().eval())
    assert not model.q.input_quantizer.is_input
    gl.calibrate(model, [batch], forward=forward)
    values = torch.cat([LEFT, RIGHT] if case != "first entry" else [LEFT])
    assert float(model.q.input_quantizer.low) == float(values.min())
    assert float(model.q.input_quantizer.high) == float(values.max())
    assert model.k.input_quantizer is model.q.input_quantizer
    assert model.q.input_quantizer.is_input
    assert not model.rest.input_quantizer.is_input
    assert not model._forward_pre_hooks


def test_bad_values_name_the_site_of_a_model_that_was_not_traced() -> None:
    model = gl.convert(Several().eval())
    with pytest.raises(ValueError, match=r"calibrate: the values at 'rest\.input' range from nan"):
        gl.calibrate(model, [{"left": LEFT, "scale": float("nan")}])
    assert set(ranges(model).values()) == {(None, None)}


def test_a_mapping_is_not_a_list_of_batches() -> None:
    with pytest.raises(TypeError, match=r"batches is a mapping; put it in a list: \[batch\]"):
        gl.calibrate(gl.convert(Several()), {"left": LEFT})


class Sum(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2, 4), torch.ones(2, 4)), "Sum cannot be called .* 'y'.*pass forward=lambda"),
        ({"x": torch.ones(2, 4), "other": 1}, "Sum cannot be called .*pass forward=lambda"),
        (torch.ones(2, 4).numpy(), r"NumPy array; pass tensors, such as torch\.from_numpy"),
    ],
    ids=["two inputs", "another key", "an array"],
)
def test_a_batch_that_the_model_does_not_accept_is_explained(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gl.calibrate(gl.convert(Sum()), [batch])
    pairs = [(torch.ones(2, 4), torch.ones(2, 4))]
    gl.calibrate(gl.convert(Sum()), pairs, forward=lambda model, batch: model(*batch))


def test_batches_made_in_inference_mode() -> None:
    model = gl.convert(Several().eval())
    with torch.inference_mode():
        gl.calibrate(model, [LEFT + 1])
    assert model.q.input_quantizer.is_input
    assert model.k.input_quantizer is model.q.input_quantizer


def test_an_input_that_the_model_did_not_get_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
            return self.linear(x) + ids[:, None]

    model, batch = gl.convert(Two().eval()), (torch.ones(2), torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"linear\.input must be a tensor, got None"):
        gl.calibrate(model, [batch])  # the second entry counts as the labels
    gl.calibrate(model, [{"ids": batch[0], "x": batch[1]}])
