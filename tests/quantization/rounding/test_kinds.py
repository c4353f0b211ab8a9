"""Layers of every kind, and bad arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.quantization.rounding.models import (
    VGG,
    X,
    outputs,
    rounded,
)

GPTQ, AdaRound = gl.rounding.GPTQ, gl.rounding.AdaRound


class Kinds(nn.Module):
    """Layers with one weight, of other kinds, and of none that can be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.again = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        self.up, self.spare = nn.ConvTranspose1d(4, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.words(x))) + 1)
        return self.up(self.normed(torch.relu(x)).mT)


def test_layers_of_every_kind() -> None:
    torch.manual_seed(0)
    model: Any = gl.convert(Kinds().eval())
    ids = torch.randint(9, (7, 5))
    report = gl.round_weights(model, iter([ids, ids[:2]]), w=3, method=GPTQ())
    assert [row.name for row in report.rows] == ["first", "normed"]
    assert report["normed"].chosen <= report["normed"].nearest
    assert report.nearest == {
        "words": "an embedding has no inputs to weigh errors with",
        "up": "a transposed convolution",
        "spare": "no value reached it",
    }
    codes = [m.weight_quantizer.rounded.get(3) for m in (model.first, model.again)]
    assert torch.equal(*codes)
    with gl.bits(model, w=3, a=None):
        model(ids)
        with torch.no_grad():
            model.normed.parametrizations.weight.original1[0, 0] += 1e-4
        with pytest.raises(RuntimeError, match="the weight of normed"):
            model(ids)


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(inside, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def test_a_transposed_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    model: Any = gl.convert(nn.Sequential(Conv1D(3, 8)), per_channel=True)
    x = torch.randn(9, 8) @ torch.randn(8, 8)
    twin: Any = gl.convert(nn.Sequential(nn.Linear(8, 3)), per_channel=True)
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight.t())
    for each in (model, twin):
        gl.round_weights(each, [x], w=3)
    assert torch.equal(model[0].weight_quantizer.rounded[3].t(), twin[0].weight_quantizer.rounded[3])


def test_bad_arguments_and_data_leave_the_codes(tmp_path: Path) -> None:
    model = rounded()
    before = outputs(model)
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"w": 3, "batches": [bad]}, ValueError, "the input or the weight of '0' holds NaN"),
        ({"w": 3, "batches": []}, ValueError, "round_weights: got no batches"),
        ({"w": 3, "batches": X}, TypeError, "batches is a tensor"),
        ({"w": 3, "method": "best"}, ValueError, "method must be one of 'gptq', 'adaround', got 'best'"),
        ({"w": 3, "method": 3}, TypeError, "a name or an object of gradl1_fast.rounding"),
        ({"w": {"x": 3}}, ValueError, "unknown name 'x'"),
    )
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            gl.round_weights(model, **{"batches": [X], **arguments})
    now = outputs(model)
    assert all(torch.equal(now[w], before[w]) for w in before)
    with pytest.raises(ValueError, match="GPTQ: damping must be more than 0"):
        GPTQ(damping=0)
    with pytest.raises(
        ValueError, match="AdaRound: inputs must be one of 'renormalised', 'rounded', 'float'"
    ):
        AdaRound(inputs="quantized")
    with pytest.raises(ValueError, match="round_weights: the model is not converted"):
        gl.round_weights(VGG.make(), [X], w=3)


def test_save_any_bit_warns_that_codes_are_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="any-bit files are safetensors")
    model = rounded()
    with pytest.warns(UserWarning, match="save_any_bit: .* gradl1_fast.round_weights are not saved"):
        gl.save_any_bit(model, tmp_path / "m")
    gl.clear_rounding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.save_any_bit(model, tmp_path / "m")
