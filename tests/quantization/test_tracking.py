"""Ranges tracked in training compared with manual results; evaluation does not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from tests.networks import VGG

BATCHES = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-4.0, 0.5]]), torch.tensor([[0.0, 8.0]])]


def layer() -> nn.Module:
    model = gl.convert(nn.Linear(2, 1)).train()
    model.input_quantizer.bits = 8
    return model


def ends(model: nn.Module) -> tuple[float, float]:
    return float(model.input_quantizer.low), float(model.input_quantizer.high)


def averages(start: tuple[float, float] | None) -> list[tuple[float, float]]:
    """Return the moving average, of momentum 0.9, after each batch, in plain numbers."""
    found = []
    for x in BATCHES:
        low, high = float(x.min()), float(x.max())
        start = (low, high) if start is None else (0.9 * start[0] + 0.1 * low, 0.9 * start[1] + 0.1 * high)
        found.append(start)
    return found


def test_a_moving_average_holds_the_batch_that_it_quantizes() -> None:
    model = layer()
    with gl.track_ranges(model, "moving_average"):
        for x, expected in zip(BATCHES, averages(None), strict=True):
            model(x)
            assert ends(model) == pytest.approx(expected)


def test_in_hindsight_each_batch_is_quantized_by_the_range_before_it() -> None:
    model = layer()
    expected = averages(None)
    with gl.track_ranges(model) as same:
        assert same is model
        for x, range_used in zip(BATCHES, [expected[0], expected[0], expected[1]], strict=True):
            model(x)
            assert ends(model) == pytest.approx(range_used)
    assert ends(model) == pytest.approx(expected[2])


def test_tracking_starts_with_the_calibrated_range() -> None:
    model = layer()
    gl.calibrate(model, [torch.tensor([[-3.0, 3.0]])])
    expected = averages((-3.0, 3.0))
    with gl.track_ranges(model):
        for x, range_used in zip(BATCHES, [(-3.0, 3.0), *expected[:2]], strict=True):
            model(x)
            assert ends(model) == pytest.approx(range_used)


@pytest.mark.parametrize("name", ["in_hindsight", "moving_average"])
def test_evaluation_changes_nothing(name: str) -> None:
    model = gl.convert(VGG.make().train())
    x = VGG.batch()[0]
    with gl.track_ranges(model, name):
        model(x)
        model(x)
        model.eval()
        before = {key: value.clone() for key, value in model.named_buffers()}
        model(100 * x)
        assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    with torch.no_grad():
        model.train()(100 * x)
    lows = [key for key in before if key.endswith(".high")]
    assert len(lows) == len(named_quantizers(model))


def test_float_training_leaves_a_calibrated_model_and_exact_gradients() -> None:
    grads: list[list[Tensor]] = []
    for tracked in (False, True):
        model = gl.convert(VGG.make().train())
        penalty = gl.GradL1(model, 0.1, 0.1)
        if tracked:
            with gl.track_ranges(model):
                loss = VGG.loss(model)
        else:
            loss = VGG.loss(model)
        (loss + penalty(loss)).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)
    gl.set_bits(model, w=4, a=4)


@pytest.mark.parametrize("name", ["in_hindsight", "moving_average"])
def test_a_bad_value_is_named_at_once_and_the_range_is_kept(name: str) -> None:
    model = layer()
    with gl.track_ranges(model, name):
        model(BATCHES[0])
        with pytest.raises(ValueError, match=r"track_ranges: the values at 'input' range from nan"):
            model(torch.tensor([[1.0, float("nan")]]))
        assert ends(model) == (-1.0, 2.0)


def test_an_exception_ends_the_tracking() -> None:
    model = layer()
    with pytest.raises(KeyError), gl.track_ranges(model):
        raise KeyError
    assert model.input_quantizer.observer is None


def test_other_methods_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'in_hindsight' or 'moving_average', got MeanSquaredError"):
        gl.track_ranges(layer(), "mse").__enter__()
    with pytest.raises(ValueError, match="no activation quantizers"):
        gl.track_ranges(VGG.make()).__enter__()
