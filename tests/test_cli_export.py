"""``gradl1 export`` on a small run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gradl1_fast as gl

pytest.importorskip("typer", reason="the command needs typer")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime")
pytest.importorskip("safetensors", reason="runs are in safetensors")

from typer.testing import CliRunner, Result

from gradl1_fast.cli import app
from gradl1_fast.cli import export as command
from gradl1_fast.quantization.export import agreement
from gradl1_fast.training import data
from gradl1_fast.training.config import Config, Model
from gradl1_fast.training.runs import folder as runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not trained, but for its batch norms."""
    folder = runs.Folder(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    config, digits = Config(model=Model(width=4)), data.load("digits")
    model = runs.network(config, 10, 1)
    with torch.no_grad():
        for images in digits.train[0].split(100)[:12]:
            model.train()(images)
    gl.calibrate(model.eval(), [digits.train[0]])
    folder.write_config(config)
    folder.write_model(model, digits)
    return folder.path


def gradl1(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})


def test_onnx(run: Path) -> None:
    result = gradl1(run, "--w", 4, "--a", 8)
    assert result.exit_code == 0, result.output
    assert (run / "model-w4-a8.onnx").stat().st_size > 1000
    for words in (
        "accuracy of the file",
        "largest code difference",
        "top-1 agreement",
        "100.00 %",
        "500 test images",
        "9 of 9",
        "ms for one input",
    ):
        assert words in result.output


def test_another_format(run: Path) -> None:
    result = gradl1(run, "--format", "any-bit", "--inputs", 50)
    assert result.exit_code == 0, result.output
    assert "largest code difference" not in result.output
    loaded = runs.load(run)
    gl.load_any_bit(loaded.model, run / "model-any-bit.safetensors", w=3)
    size = (run / "model-any-bit.safetensors").stat().st_size
    assert f"{size:,}" in result.output


def test_a_mismatch_fails_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "TOP_1", 1.5)
    result = gradl1(run, "--out", tmp_path / "file", "--format", "any-bit")
    assert result.exit_code == 1
    assert "no file was written: top-1 agreement is 100.00 %, required is 150 %" in result.output
    assert result.output.count("gradl1:") == 1
    assert not list(tmp_path.iterdir())


def test_too_large_a_loss_of_accuracy_fails_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "accuracy", lambda model, batch: 99.0)
    out = tmp_path / "file"
    assert gradl1(run, "--out", out, "--format", "any-bit", "--max-drop", 100).exit_code == 0
    out.unlink()
    result = gradl1(run, "--out", out, "--format", "any-bit", "--max-drop", 1)
    assert result.exit_code == 1
    assert "no file was written: accuracy drops from 99.00 to " in result.output
    assert not list(tmp_path.iterdir())


def test_widths_are_prompted_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = gradl1(run)
    assert result.exit_code == 1
    assert "which widths? Give --w and --a" in result.output
    monkeypatch.setattr(command, "_is_answered", lambda: True)
    monkeypatch.setattr(command, "_write", lambda *args: print("widths:", *args[4:6]))
    answered = CliRunner().invoke(app, ["export", str(run)], input="4\n\n")
    assert answered.exit_code == 0, answered.output
    assert "widths: 4 8" in answered.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--w", 9), "export has widths 1 to 8 and 16, got 9"),
        (("--format", "any-bit", "--w", 4), "an any-bit file holds every width"),
        (("--w", 4, "--out", "/nowhere/x.onnx"), "gradl1: /nowhere: the folder to write to does not exist"),
    ],
)
def test_what_is_refused(run: Path, arguments: tuple[object, ...], message: str) -> None:
    result = gradl1(run, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("gradl1:") == 1


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    result = gradl1(tmp_path)
    assert result.exit_code == 1
    assert "not the folder of a finished run" in result.output
