from __future__ import annotations

from pathlib import Path

import pytest

import gradl1_fast as gl
from tests.quantization.any_bit.models import converted


@pytest.fixture
def path(tmp_path: Path) -> Path:
    gl.save_any_bit(converted(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
