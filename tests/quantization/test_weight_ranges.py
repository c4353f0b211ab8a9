"""Stored weight ranges: clamping, and errors of the penalty."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import VGG


def converted(per_channel: bool = False) -> nn.Module:
    model = gl.convert(VGG.make().eval(), per_channel=per_channel)
    with torch.no_grad():
        for layer in layers(model):
            layer.weight.view(-1)[::7] *= 8  # outliers, so that to clamp is better than not to
    return model


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, gl.nn.QuantizedLayer)]


def quantized(weight: Tensor, clip: np.ndarray, bits: int) -> np.ndarray:
    """Return the weight on the grid of a range from -clip to clip, by NumPy."""
    limit = 2 ** (bits - 1) - 1
    scale = clip.reshape(-1, *[1] * (weight.dim() - 1)) / limit
    return scale * np.clip(np.rint(weight.detach().numpy() / scale), -limit, limit)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_clamped_to_the_stored_range(per_channel: bool, bits: int) -> None:
    model = converted(per_channel)
    gl.calibrate_weights(model, ranges=gl.ranges.StandardDeviation(1.5))
    gl.set_bits(model, w=bits, a=None)
    for layer in layers(model):
        w = layer.weight.detach().numpy()
        rows = w.reshape(w.shape[0], -1) if per_channel else w.reshape(1, -1)
        mean, sigma = rows.mean(1), rows.std(1)
        low, high = np.maximum(mean - 1.5 * sigma, rows.min(1)), np.minimum(mean + 1.5 * sigma, rows.max(1))
        expected = quantized(layer.weight, np.maximum(np.maximum(-low, high), 0), bits)
        np.testing.assert_allclose(
            layer.weight_quantizer(layer.weight).detach(), expected, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_best_ranges_have_a_smaller_error_at_every_low_width(per_channel: bool) -> None:
    model = converted(per_channel)
    own = {}
    for ranges in ("min_max", "mse"):
        gl.calibrate_weights(model, ranges=ranges)
        for bits in (2, 3, 4):
            gl.set_bits(model, w=bits, a=None)
            errors = [float((m.weight_quantizer(m.weight) - m.weight).detach().norm()) for m in layers(model)]
            own.setdefault(bits, []).append(errors)
    for before, after in own.values():
        assert all(a < b for b, a in zip(before, after, strict=True))


def test_min_max_restores_the_weights_own_range() -> None:
    model = converted()
    layer = layers(model)[0]
    gl.calibrate_weights(model, ranges="mse")
    assert layer.weight_quantizer.clip.shape == (16, 1)
    assert "range=stored" in repr(layer.weight_quantizer)
    gl.calibrate_weights(model, ranges="min_max")
    assert layer.weight_quantizer.clip is None
    layer.weight_quantizer.bits = 4
    before = layer.weight_quantizer(layer.weight).detach()
    with torch.no_grad():
        layer.weight *= 2
    torch.testing.assert_close(layer.weight_quantizer(layer.weight).detach(), 2 * before)


def test_gradients_stop_where_weights_are_clamped() -> None:
    model = converted()
    gl.calibrate_weights(model, ranges="mse")
    gl.set_bits(model, w=3, a=None)
    layer = layers(model)[0]
    VGG.loss(model).backward()
    clip = float(layer.weight_quantizer.clip[2, 0])
    beyond = layer.weight.detach().abs() > clip * (1 + 0.5 / 3)
    assert beyond.any()
    assert not layer.weight.grad[beyond].any()
    assert layer.weight.grad[layer.weight.detach().abs() < clip].any()


def test_the_penalty_refuses_clamped_weights_by_name_and_is_exact_in_float() -> None:
    model = converted()
    expected = gl.GradL1(model, 0.1, 0.0)(VGG.loss(model)).detach()
    gl.calibrate_weights(model, ranges="mse")
    penalty = gl.GradL1(model, 0.1, 0.0)
    torch.testing.assert_close(penalty(VGG.loss(model)).detach(), expected, rtol=0, atol=0)
    gl.set_bits(model, w=4, a=None)
    with pytest.raises(
        RuntimeError, match=r"GradL1: 0\.weight is quantized in a stored range.*calibrate_weights"
    ):
        penalty(VGG.loss(model))
    loss = VGG.loss(model)
    gl.set_bits(model, w=None, a=None)
    with pytest.raises(RuntimeError, match=r"GradL1: 0\.weight is quantized in a stored range"):
        penalty(loss)  # in float again, but its forward pass was not
    gl.set_bits(model, w=4, a=None)
    gl.calibrate_weights(model, ranges="min_max")
    assert penalty(VGG.loss(model)).isfinite()


def test_only_activations_are_penalised_at_clamped_weights() -> None:
    model = converted()
    gl.calibrate_weights(model, ranges="mse")
    gl.set_bits(model, w=4, a=None)
    assert float(gl.GradL1(model, 0.0, 0.1)(VGG.loss(model)).detach()) > 0


@pytest.mark.parametrize("name", ["moving_average", "in_hindsight", "batch_norm"])
def test_methods_that_need_batches_do_not_support_weights(name: str) -> None:
    with pytest.raises(ValueError, match="supports activations only"):
        gl.calibrate_weights(converted(), ranges=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["min_max", "mse", "percentile"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(name: str, value: float) -> None:
    model = converted(per_channel=True)
    gl.calibrate_weights(model, ranges="percentile")
    before = [m.weight_quantizer.clip.clone() for m in layers(model)]
    with torch.no_grad():
        model.get_submodule("7").weight[1, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=re.escape("calibrate_weights: the weight of '7' holds NaN or infinity")
    ):
        gl.calibrate_weights(model, ranges=name)
    assert all(torch.equal(m.weight_quantizer.clip, b) for m, b in zip(layers(model), before, strict=True))


def test_a_zero_weight_has_a_range() -> None:
    layer = gl.convert(nn.Linear(3, 2))
    nn.init.zeros_(layer.weight)
    gl.calibrate_weights(layer, ranges="mse")
    layer.weight_quantizer.bits = 4
    assert not layer.weight_quantizer(layer.weight).any()


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers of this library"):
        gl.calibrate_weights(VGG.make())


WRONG = {
    "rows": (torch.ones(3, 1), r"clip must have shape \(1 or 16, channels\), got \(3, 1\)"),
    "dimensions": (torch.ones(16), r"got \(16,\)"),
    "columns": (torch.ones(1, 4), "a single range for the tensor needs one column, got 4"),
    "negative": (-torch.ones(1, 1), "clip must be finite and 0 or more"),
    "NaN": (torch.full((1, 1), torch.nan), "clip must be finite and 0 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_ranges_are_refused(case: str) -> None:
    clip, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        gl.nn.WeightQuantizer().set_clip(clip)
