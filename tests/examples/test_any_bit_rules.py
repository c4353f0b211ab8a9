"""The compared rounding rules of any-bit files, and the chosen one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization import bit_planes

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("any_bit_rules", None)
    return importlib.import_module("any_bit_rules")


def test_files_are_decoded_with_the_middle_rule(rules: ModuleType) -> None:
    x = torch.randn(6, 4, 3, 3)
    scale = x.abs().max() / 127
    for w in rules.WIDTHS:
        wanted = bit_planes.decode(bit_planes.encode(x, scale), scale, w)
        torch.testing.assert_close(rules.middle(x, x.abs().max(), w), wanted)


def test_the_direct_rule_equals_the_quantizer(rules: ModuleType) -> None:
    layer = gl.QLinear(20, 10)
    for w in rules.WIDTHS:
        layer.weight_quantizer.bits = w
        weight = layer.weight.detach()
        torch.testing.assert_close(
            rules.direct(weight, weight.abs().max(), w), layer.weight_quantizer(weight)
        )


def test_every_rule_is_measured_and_weights_are_restored(rules: ModuleType) -> None:
    model = gl.convert(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(50, 9)
    wanted = model(x).detach()
    for per_channel in (False, True):
        found = rules.measure(model, lambda m: float((m(x) - wanted).abs().mean()), per_channel)
        assert found.shape == (len(rules.RULES), len(rules.WIDTHS))
        by_name = dict(zip(rules.RULES, found, strict=True))
        torch.testing.assert_close(by_name["middle"][0], by_name["direct"][0], rtol=1e-3, atol=0)
        assert by_name["direct"][0] < 0.1 * by_name["direct"][-1]
        assert (by_name["floor"][1:] > 2 * by_name["middle"][1:]).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
