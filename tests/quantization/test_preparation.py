"""Preparation in one call equals its separate steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import MOBILENET, NO_NORM, VGG, Network


def batches(network: Network) -> list[Tensor]:
    x = network.batch()[0]
    return [x, x.flip(0) * 1.2]


def trained(network: Network) -> nn.Module:
    """Return a network whose statistics are those of the data."""
    model = network.make().eval()
    if network is not NO_NORM:
        gl.reestimate_batch_norm(gl.convert(model), batches(network))
    return model


def by_hand(network: Network, w: int, a: int | None, *, rounding: bool = False) -> nn.Module:
    model = gl.convert(trained(network), per_channel=True)
    gl.calibrate(model, batches(network), ranges="mse")
    gl.calibrate_weights(model, ranges="mse")
    if rounding:
        gl.round_weights(model, batches(network), w=w, a=a)
    gl.set_bits(model, w=w, a=a)
    gl.reestimate_batch_norm(model, batches(network))
    return model


@pytest.mark.parametrize(
    ("w", "a", "rounding"), [(3, 4, None), (2, None, None), (5, 4, "gptq"), (3, 4, "auto"), (5, 4, "auto")]
)
@pytest.mark.parametrize("converted", [False, True])
def test_it_equals_its_separate_steps(w: int, a: int | None, rounding: str | None, converted: bool) -> None:
    model, x = trained(MOBILENET), MOBILENET.batch()[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(x)
    given = gl.convert(model) if converted else model  # with one range for a tensor
    prepared = gl.prepare(given, batches(MOBILENET), w=w, a=a, rounding=rounding)
    rounded = rounding == "gptq" or (rounding == "auto" and w <= 4)
    assert torch.equal(prepared.model(x), by_hand(MOBILENET, w, a, rounding=rounded)(x))
    with gl.bits(prepared.model, w=None, a=None):
        assert torch.equal(prepared.model(x), before)
    assert torch.equal(given(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not converted or given.stem[0].weight_quantizer.axis is None
    names = [step.name for step in prepared.steps]
    assert names[0] == "float"
    assert names[-1] == "batch-norm statistics at the width"
    assert ("ranges of activations: mse" in names) == (a is not None)
    assert ("rounding: gptq" in names) == rounded


def test_another_width_keeps_both() -> None:
    first = gl.prepare(trained(VGG), batches(VGG), w=3, a=3)
    second = gl.prepare(first.model, batches(VGG), w=2, a=4)
    x = VGG.batch()[0]
    for w, a in ((2, 4), (3, 3)):
        with gl.bits(second.model, w=w, a=a):
            assert torch.equal(second.model(x), by_hand(VGG, w, a, rounding=True)(x))


def test_the_same_width_again_starts_over() -> None:
    model, options = trained(VGG), {"w": 3, "a": 4, "criterion": distance, "higher_is_better": False}
    first = gl.prepare(model, batches(VGG), **options)
    second = gl.prepare(first.model, batches(VGG), **options)
    nearest = gl.prepare(first.model, batches(VGG), rounding=None, **options)
    assert second.steps == first.steps
    assert nearest.steps == gl.prepare(model, batches(VGG), rounding=None, **options).steps


def distance(model: nn.Module) -> float:
    x = VGG.batch()[0]
    return float((model(x) - trained(VGG)(x)).detach().norm())


def test_the_report_shows_the_change_of_each_step() -> None:
    prepared = gl.prepare(trained(VGG), batches(VGG), w=3, a=8, criterion=distance, higher_is_better=False)
    values = [step.value for step in prepared.steps]
    assert values[0] == 0
    assert values[-1] == distance(prepared.model)
    assert values[-1] < 0.8 * values[1]
    assert str(prepared).splitlines()[-2].startswith("batch-norm statistics at the width")
    assert not any(step.value for step in gl.prepare(VGG.make(), batches(VGG), w=3, a=8).steps)


def test_steps_that_make_the_criterion_worse_are_undone() -> None:
    """Statistics of other data than the network was trained with."""
    x = VGG.batch()[0]
    prepared = gl.prepare(trained(VGG), [9 * x + 5], w=6, a=None, criterion=distance, higher_is_better=False)
    last = prepared.steps[-1]
    assert last.name == "batch-norm statistics at the width"
    assert not last.taken
    assert "(taken back)" in str(prepared)
    kept = next(step.value for step in reversed(prepared.steps) if step.taken)
    assert distance(prepared.model) == kept


@pytest.mark.parametrize("wanted", [None, True, False])
def test_biases_are_corrected_without_batch_norm(wanted: bool | None) -> None:
    for network in (NO_NORM, VGG):
        prepared = gl.prepare(trained(network), batches(network), w=3, a=None, bias_correction=wanted)
        corrected = "bias correction" in [step.name for step in prepared.steps]
        assert corrected == (wanted is True or (wanted is None and network is NO_NORM))
        assert (prepared.model[0].bias is not None and network is VGG) == (corrected and network is VGG)
    assert "no batch norm to re-estimate" in gl.prepare(NO_NORM.make(), batches(NO_NORM), w=3, a=3).remarks


def test_in_float_nothing_of_the_model_changes() -> None:
    model, x = VGG.make().eval(), VGG.batch()[0]
    before = model(x)
    assert torch.equal(gl.prepare(model, batches(VGG), w=None, a=None).model(x), before)
    assert torch.equal(model(x), before)


def test_first_and_last_layer_have_the_chosen_bits() -> None:
    model = gl.prepare(trained(VGG), batches(VGG), w=3, a=4, ends=6, input_bits=8).model
    layers = [layer for layer in model if isinstance(layer, gl.nn.QuantizedLayer)]
    assert [layer.weight_quantizer.bits for layer in layers] == [6, 3, 3, 3, 6]
    assert [layer.input_quantizer.bits for layer in layers] == [8, 4, 4, 4, 6]
    model = gl.prepare(trained(VGG), batches(VGG), w=None, a=4, ends=6, input_bits=None).model
    layers = [layer for layer in model if isinstance(layer, gl.nn.QuantizedLayer)]
    assert [layer.weight_quantizer.bits for layer in layers] == [None] * 5
    assert [layer.input_quantizer.bits for layer in layers] == [None, 4, 4, 4, 6]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.norm(F.relu(self.left(left)) + self.right(right))


def test_other_calls_than_with_a_tensor_and_copies_that_are_given_the_same_tensors() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(16, 4), torch.randn(16, 4)) for _ in range(3)]
    model = gl.convert(Pair())
    first = gl.prepare(model, [dict(zip(("left", "right"), p, strict=True)) for p in pairs], w=4, a=4).model
    second = gl.prepare(first, pairs, w=4, a=4, forward=lambda m, batch: m(*batch)).model
    models = (model, first, second)
    sites = {id(layer.input_quantizer) for m in models for layer in (m.left, m.right)}
    assert len(sites) == 6  # not joined, though a tensor is given to all
    assert torch.equal(second(*pairs[0]), first(*pairs[0]))


def test_a_penalty_of_the_model_does_not_measure_the_copy() -> None:
    model = gl.convert(trained(VGG), per_channel=True)
    copy = gl.prepare(model, batches(VGG), w=4, a=4).model
    penalty = gl.GradL1(model, 0.1, 0.1)
    assert penalty.lambda_w == 0.1
    assert model[3].input_quantizer.arming.armed
    assert not copy[3].input_quantizer.arming.armed
    assert not copy[3].input_quantizer._penalties


def test_bad_arguments_are_named() -> None:
    model = VGG.make()
    with pytest.raises(TypeError, match="only once"):
        gl.prepare(model, iter(batches(VGG)), w=4, a=4)
    with pytest.raises(ValueError, match="ends needs a single width"):
        gl.prepare(model, batches(VGG), w={"0": 4}, a=4, ends=8)
    with pytest.raises(TypeError, match="criterion"):
        gl.prepare(model, batches(VGG), w=4, a=4, criterion=lambda m: "good")
    with pytest.raises(ValueError, match="no batches"):
        gl.prepare(model, [], w=4, a=4)
