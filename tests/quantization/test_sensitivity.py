"""Sensitivity to quantizing a single tensor."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization.bits import widths_of
from tests.networks import VGG


@pytest.fixture
def model() -> nn.Module:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, [VGG.batch()])
    gl.set_bits(model, w=7, a=7)
    return model


def test_each_tensor_is_quantized_alone(model: nn.Module) -> None:
    seen: list[Any] = []

    def evaluate(model: nn.Module) -> float:
        w, a = widths_of(model)
        seen.append([("w", n, b) for n, b in w.items() if b] + [("a", n, b) for n, b in a.items() if b])
        return float(len(seen))

    found = gl.sensitivity(model, evaluate, w=(4, 2), a=(3,), input_bits=1)
    w, a = widths_of(model)
    assert seen[0] == []
    assert [one for (one,) in seen[1:]] == [(r.kind, r.name, r.bits) for r in found.rows]
    assert len(found.rows) == 2 * len(w) + len(a)
    assert found.float_value == 1.0
    assert found["w", "3", 2] == 5.0
    assert set(w.values()) == {7}
    assert a == {name: 8 if name == "0.input" else 7 for name in a}
    with pytest.raises(KeyError, match="no row for"):
        found["w", "3", 8]


def test_the_change_is_that_of_the_output(model: nn.Module) -> None:
    x = VGG.batch()[0]

    def norm(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(x).norm())

    found = gl.sensitivity(model, norm, w=(2,), a=())
    plain = VGG.make().eval()
    with torch.no_grad():
        weight = plain[3].weight
        scale = weight.abs().max()
        weight.copy_((weight / scale).round() * scale)  # at 2 bits the codes are -1, 0, 1
        assert found["w", "3", 2] == pytest.approx(float(plain(x).norm()), rel=1e-12)
    assert found["w", "3", 2] != pytest.approx(found.float_value, rel=1e-3)


def test_text_table_and_plot(model: nn.Module, tmp_path: Path) -> None:
    found = gl.sensitivity(model, lambda m: 0.5, w=(4,), a=(4,))
    assert str(found).splitlines()[0].split() == ["name", "kind", "bits", "value", "change"]
    assert str(found).splitlines()[-1] == "float: 0.5000"
    found.to_csv(tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"kind": "", "name": "", "bits": "", "value": "0.5"}
    assert len(rows) == 1 + len(found.rows)
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    found.plot(tmp_path / "s.png", title="a title")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "error"), [({"w": (0,)}, ValueError), ({"a": (None,)}, TypeError), ({"w": ("4",)}, TypeError)]
)
def test_wrong_widths_are_refused_before_the_work(
    model: nn.Module, wrong: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"sensitivity: [wa]"):
        gl.sensitivity(model, lambda m: pytest.fail("evaluated"), **wrong)


def test_the_network_input_is_not_evaluated_below_its_minimum_bits(model: nn.Module) -> None:
    rows = gl.sensitivity(model, lambda m: 0.5, w=(), a=(4, 2)).rows
    assert [(r.name, r.bits) for r in rows if r.name == "0.input"] == [("0.input", 8)]
    assert [r.bits for r in rows if r.name == "3.input"] == [4, 2]
    assert "0.input" not in {r.name for r in gl.sensitivity(model, lambda m: 0.5, input_bits=None).rows}


def test_sites_without_a_range_are_skipped_unless_no_site_has_one(model: nn.Module) -> None:
    quantizers = [m.input_quantizer for m in model.modules() if isinstance(m, gl.nn.QuantizedLayer)]
    quantizers[1].low = None
    assert "3.input" not in {r.name for r in gl.sensitivity(model, lambda m: 0.5).rows}
    for quantizer in quantizers:
        quantizer.low = None
    gl.set_bits(model, w=None, a=None)
    with pytest.raises(RuntimeError, match=r"no activation range for 0\.input"):
        gl.sensitivity(model, lambda m: 0.5)
