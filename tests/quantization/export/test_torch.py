"""A network as a program of torch.export."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization.export import NotExportableError, compare_torch, export_torch, prepare
from tests.networks import MOBILENET, NO_NORM, VGG, Network
from tests.quantization.export.test_onnx import ReluFirst, calibrated, inputs, network


@pytest.mark.parametrize("which", [VGG, MOBILENET], ids=lambda n: n.id)
def test_the_program_computes_what_the_simulation_says(which: Network) -> None:
    model, x = network(which, per_channel=True)
    prepared = prepare(model, x, w=4, a=8)
    found = compare_torch(export_torch(prepared, x[:2]), prepared, x)
    assert found.outputs < 1e-5
    assert not found.faults()


def test_weights_are_integers() -> None:
    model, x = network(NO_NORM)
    for w, dtype in ((4, torch.int8), (16, torch.int16)):
        data = export_torch(prepare(model, x, w=w, a=None), x[:2])
        state = torch.export.load(io.BytesIO(data)).state_dict
        assert {value.dtype for key, value in state.items() if key.endswith("codes")} == {dtype}
        assert not any(
            value.is_floating_point() and value.dim() > 1 and value.numel() > 50 for value in state.values()
        )


def test_a_batch_norm_that_is_not_folded() -> None:
    x = inputs(20, 3, 8, 8)
    prepared = prepare(calibrated(ReluFirst(), x), x, w=8, a=8)
    assert not compare_torch(export_torch(prepared, x[:2]), prepared, x).faults()


def test_the_program_runs_without_this_library(tmp_path: Path) -> None:
    model, x = network(NO_NORM)
    prepared = prepare(model, x, w=4, a=8)
    (tmp_path / "model.pt2").write_bytes(export_torch(prepared, x[:2]))
    torch.save(x, tmp_path / "x")
    code = """
import sys, torch
y = torch.export.load("model.pt2").module()(torch.load("x"))
assert not any(name.startswith("gradl1") for name in sys.modules)
torch.save(y.detach(), "y")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y"), prepared.model(x), rtol=0, atol=1e-5)


def test_what_cannot_be_exported() -> None:
    x = inputs(2, 3, 8, 8)
    model = gl.convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")).eval())
    with pytest.raises(NotExportableError, match="0 has a padding_mode"):
        export_torch(prepare(model, x, w=4, a=None), x)


def test_nothing_to_compare() -> None:
    model, x = network(NO_NORM)
    prepared = prepare(model, x, w=4, a=8)
    with pytest.raises(ValueError, match="there are no inputs"):
        compare_torch(export_torch(prepared, x[:2]), prepared, x[:0])
