"""Without an optional package, its features say what to install, and everything else works."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast._report.page import Report, render
from gradl1_fast.quantization import export

NEEDS: dict[str, tuple[str, str, Callable[[nn.Module, Path], object]]] = {
    "reports": ("jinja2", "cli", lambda model, path: render(Report("", "", [], [], [], ""))),
    "plots": ("matplotlib.figure", "cli", lambda model, path: gl.Table([]).plot(path)),
    "ranges": ("safetensors", "export", gl.save_ranges),
    "any-bit files": ("safetensors.torch", "export", gl.save_any_bit),
    "ONNX": ("onnx", "export", lambda model, path: export.export_onnx(model, torch.ones(1, 3), w=8, a=8)),
}


@pytest.mark.parametrize("feature", NEEDS)
def test_missing_packages_are_named(feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra, use = NEEDS[feature]
    model = gl.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval())
    gl.calibrate(model, [torch.ones(1, 3)])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]' in a checkout of gradl1_fast$"):
        use(model, tmp_path / "file")
    assert not list(tmp_path.iterdir())


# Tests that need one of these are skipped without it.
EXTRAS = (
    *("PIL", "expecttest", "hypothesis", "jax", "jinja2", "lightning", "matplotlib", "onnx", "onnxruntime"),
    "onnxscript",
    *("msgspec", "pybind11", "rich", "safetensors", "sklearn", "tensorboard", "tomli_w", "triton", "typer"),
)


@pytest.mark.skipif("CI" not in os.environ, reason="CI is not set: elsewhere packages may be missing")
def test_continuous_integration_skips_nothing_for_a_missing_package() -> None:
    assert [name for name in EXTRAS if find_spec(name) is None] == []
