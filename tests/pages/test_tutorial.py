"""The tutorial: its blocks, in order, in an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages.blocks import ROOT, blocks, run

FEW_EPOCHS = 3


def test_the_tutorial_ends_with_a_file_that_knows_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sklearn", "safetensors", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_EPOCHS", str(FEW_EPOCHS))
    names: dict[str, object] = {"__name__": "tutorial"}
    for block in blocks(ROOT / "docs" / "tutorial.md", "python"):
        run(block, names)
    float_accuracy = names["evaluate"](names["model"])
    assert float_accuracy > 90
    assert 100 * names["right"] > float_accuracy - 8
    assert names["right"] < 1
    file, state_dict = names["size"]
    assert file < state_dict / 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits.pt",
        "ranges.safetensors",
        "digits-4-bit.onnx",
    }
    assert "with the penalty" in capsys.readouterr().out
