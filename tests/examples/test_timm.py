"""The example with a timm network, and timm networks by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training import models

try:
    import timm
except (ImportError, RuntimeError) as error:  # its torchvision may be of another build than torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_example_trains_and_survives_six_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.syspath_prepend(EXAMPLES)
    sys.modules.pop("timm_network", None)
    import timm_network

    file = tmp_path / "rows.json"
    monkeypatch.setattr(timm_network, "SIZE", 16)
    arguments = ["--epochs", "2", "--penalty-epochs", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["timm_network.py", *arguments])
    timm_network.main()
    assert "with the penalty, 1 epochs" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    found = {(row["stage"], row["w"], row["a"]): row["top1"] for row in rows}
    assert len(found) == 2 * len(timm_network.WIDTHS)
    assert found["with the penalty", None, None] > 70
    assert found["with the penalty", 6, 6] > found["with the penalty", None, None] - 10


def test_a_network_of_timm_by_name_converts_without_a_change() -> None:
    assert "test_resnet" in timm.list_models()
    model = models.build("timm:test_resnet", classes=4, channels=1).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(gl.convert(model)(x), model(x))
    with pytest.raises(ValueError, match="timm has no model 'resnet17'"):
        models.build("timm:resnet17")
