"""Export as a program of torch.export."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradl1_fast.quantization.export import FORMATS, NotExportableError, compare_torch, export_torch, simulate
from tests.networks import NO_NORM
from tests.quantization.export.models import (
    RESIDUAL,
    Branching,
    FixedBatch,
    OfDict,
    calibrated,
    inputs,
    network,
)


def test_the_program_agrees_with_the_simulation_without_this_library(tmp_path: Path) -> None:
    model, x = network(RESIDUAL)
    prepared = simulate(model, x, w=4, a=8)
    data = export_torch(prepared, x)
    found = compare_torch(data, prepared, x)
    assert found.outputs < 1e-5
    assert not found.faults()
    (tmp_path / "model.pt2").write_bytes(data)
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
    with pytest.raises(ValueError, match="there are no inputs"):
        compare_torch(data, prepared, x[:0])


def test_weights_are_integers() -> None:
    model, x = network(NO_NORM)
    for w, dtype in ((4, torch.int8), (16, torch.int16)):
        file = FORMATS["torch-export"].write(model, x, w=w, a=None)
        state = torch.export.load(io.BytesIO(file.data)).state_dict
        assert {value.dtype for key, value in state.items() if key.endswith("codes")} == {dtype}
        floats = [value for value in state.values() if value.is_floating_point() and value.dim() > 1]
        assert not any(value.numel() > 50 for value in floats)


def test_a_dictionary_goes_in() -> None:
    x = ({"a": inputs(6, 4), "b": inputs(6, 4)},)
    file = FORMATS["torch-export"].write(calibrated(OfDict(), x), x, w=8, a=8)
    assert not FORMATS["torch-export"].compare(file, x).faults()
    assert file.remarks == ["in float, because they are not called as layers: by_function"]
    few = {name: tensor[:2] for name, tensor in x[0].items()}
    with torch.no_grad():
        y = torch.export.load(io.BytesIO(file.data)).module()(few)
        torch.testing.assert_close(y, file.prepared.model(few), rtol=0, atol=1e-5)


def test_a_batch_that_a_model_fixes_is_fixed_with_a_remark() -> None:
    x = inputs(3, 4)
    file = FORMATS["torch-export"].write(calibrated(FixedBatch(), x), x, w=8, a=8)
    assert file.remarks[0].startswith("the batch is fixed at 3: ")
    assert not FORMATS["torch-export"].compare(file, x).faults()


def test_what_cannot_be_exported() -> None:
    x = inputs(4, 4)
    with pytest.raises(NotExportableError, match=r"torch\.export cannot export part"):
        export_torch(simulate(calibrated(Branching(), x), x, w=4, a=None), x)
