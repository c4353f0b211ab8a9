"""A model computes with its codes, and copies and files keep them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.quantization.rounding.models import (
    DTYPE,
    VGG,
    X,
    by_hand,
    calibrated,
    layers,
    output,
    outputs,
    rounded,
    statistics,
)

GPTQ, AdaRound = gl.rounding.GPTQ, gl.rounding.AdaRound


@pytest.mark.filterwarnings("ignore:the weights of .* have changed")  # those of the model made by hand
@pytest.mark.parametrize("method", [GPTQ(inputs="float"), AdaRound(steps=20)], ids=["gptq", "adaround"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_model_computes_with_the_codes(per_channel: bool, method: gl.rounding.RoundingMethod) -> None:
    model = calibrated(per_channel)
    nearest, buffers = outputs(model), [b.clone() for b in statistics(model)]
    report = gl.round_weights(model, [X], w=3, a=4, method=method)
    assert [row.name for row in report.rows] == list(layers(model))
    assert all(row.chosen <= row.nearest for row in report.rows)
    assert sum(row.chosen < row.nearest for row in report.rows) > 2
    assert str(report).splitlines()[1].split()[:2] == ["0", "3"]
    now = outputs(model)
    with gl.bits(by_hand(model, 3), w=None, a=4) as plain, torch.no_grad():
        torch.testing.assert_close(now["3"], plain(X))
    assert all(torch.equal(b, now_b) for b, now_b in zip(buffers, statistics(model), strict=True))
    assert not torch.allclose(now["3"], nearest["3"])
    assert all(torch.equal(now[w], nearest[w]) for w in ("4", "None"))
    assert "rounded=[3]" in repr(layers(model)["0"].weight_quantizer)
    gl.clear_rounding(model)
    assert torch.equal(outputs(model)["3"], nearest["3"])


@pytest.mark.parametrize("inputs", ["rounded", "renormalised"])
def test_a_layer_compensates_for_errors_of_earlier_layers(inputs: str) -> None:
    distances = {}
    for where in ("float", inputs):
        model = calibrated()
        gl.round_weights(model, [X], w=3, a=4, method=GPTQ(inputs=where))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        with gl.bits(model, w=None, a=None), torch.no_grad():
            exact = model(X)
        for norm in norms if inputs == "renormalised" else ():
            norm.training, norm.track_running_stats = True, False
        with gl.bits(model, w=3, a=4), torch.no_grad():
            distances[where] = float((model(X) - exact).norm())
    assert distances[inputs] < 0.8 * distances["float"]


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "converted twice": lambda model, _: gl.convert(nn.Sequential(model)),
    "double and back": lambda model, _: copy.deepcopy(model).double().float(),
    "file": lambda model, path: through_file(model, path),
}


def through_file(model: nn.Module, path: Path) -> nn.Module:
    pytest.importorskip("safetensors", reason="files of ranges are safetensors")
    gl.save_ranges(model, path / "r")
    other = rounded(2)  # codes that are not in the file go
    gl.load_ranges(other, path / "r")
    assert list(layers(other)["0"].weight_quantizer.rounded) == [3]
    return other


@pytest.mark.parametrize("case", COPIES)
def test_copies_and_files_keep_the_codes(case: str, tmp_path: Path) -> None:
    model = rounded()
    expected = outputs(model)
    now = outputs(COPIES[case](model, tmp_path))
    assert all(torch.equal(now[w], expected[w]) for w in expected)
    assert not torch.allclose(expected["3"], outputs(calibrated())["3"])


def test_every_use_of_the_model_applies_the_codes() -> None:
    model = rounded()
    expected = output(model, 3)
    table = gl.sweep(model, lambda m: float(m(X).detach().sum()), [(3, 4), (3, 4), (4, 4)], workers=2)
    assert table[3, 4] == pytest.approx(float(expected.sum()), abs=1e-6)


def test_compiled_code_checks_that_the_codes_belong_to_the_weight() -> None:
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), per_channel=True)
    x = torch.randn(32, 8) @ torch.randn(8, 8)
    gl.calibrate_weights(model, ranges="mse")
    with gl.bits(model, w=3, a=None), torch.no_grad():
        nearest = model(x)
        gl.round_weights(model, [x], w=3)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), nearest)
        layers(model)["2"].weight.mul_(1.01)
        with pytest.raises(RuntimeError, match="the weight of 2, or its stored range, has changed since"):
            compiled(x)


def test_the_penalty_applies_to_the_weights_in_use() -> None:
    model = gl.convert(VGG.make().train(), per_channel=True)
    x, y = VGG.batch()
    gl.round_weights(model, [x], w=3)
    gradients = []
    for candidate, w in ((model, 3), (by_hand(model, 3), None)):
        penalty = gl.GradL1(candidate, 0.1, 0.1, scale="none")
        with gl.bits(candidate, w=w, a=None):
            loss = nn.functional.cross_entropy(candidate(x), y)
        (loss + penalty(loss)).backward()
        gradients.append([p.grad for p in candidate.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    ranged = rounded()
    penalty = gl.GradL1(ranged, 0.1, 0)
    with gl.bits(ranged, w=3, a=None):
        loss = VGG.loss(ranged, DTYPE)
    with pytest.raises(RuntimeError, match="quantized in a stored range"):
        penalty(loss)
