"""README's speed table is what the committed results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import readme, results
from bench.processes import HERE
from bench.workloads import LAUNCH_BOUND

LAUNCHES = LAUNCH_BOUND[0].numbers()


def row(provider: str, operation: str, ratio: float | None, size: str = "small") -> dict[str, object]:
    return {
        "provider": provider, "operation": operation, "size": size, "dtype": "float32", "device": "cpu",
        "ratio_to_plain": ratio, "median_ms": ratio, "p20_ms": ratio, "p80_ms": ratio, "exact": True,
    }  # fmt: skip


def test_the_readme_is_up_to_date() -> None:
    text = (HERE / "README.md").read_text()
    assert readme.rewritten(text) == text, "run python -m bench.readme"


def test_the_table_shows_what_was_measured_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results" / "toaster" / "step"
    rows = [
        row("plain", "resnet18", 1.0),
        row("gradl1_fast", "resnet18", 3.214),
        row("JAX, grad of grad", "resnet18", None),
        row('gradl1_fast, scale="step"', "resnet18", 3.5),
        row("plain", "resnet18", 1.0, size=LAUNCHES),
        row("eager double backprop", "resnet18", 6.25, size=LAUNCHES),
        row("plain", "vgg_like", 1.0),
        row("eager double backprop", "vgg_like", 5.5),
        row("gradl1_fast", "vgg_like", 9.0, size="large"),
    ]
    results.write(folder, rows)
    environment = json.loads((folder / "environment.json").read_text())
    environment["devices"]["cpu"] = "a toaster"
    (folder / "environment.json").write_text(json.dumps(environment))
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "HERE", tmp_path)
    lines = readme.section().splitlines()
    assert lines[:6] == [
        "| time of a step, plain = 1 (a toaster) | ResNet-18 | VGG-like | ResNet-18, launches alone |",
        "|---|---|---|---|",
        "| plain training step | 1.00 | 1.00 | 1.00 |",
        '| **gradl1_fast, as recommended** (`scale="step"`) | **3.50** | - | - |',
        '| gradl1_fast, `scale="none"` | 3.21 | - | - |',
        "| double backprop in eager PyTorch | - | 5.50 | 6.25 |",
    ]
    assert "JAX" not in "".join(lines)
    text = f"before {readme.BEGIN} old {readme.END} after"
    assert readme.rewritten(text) == f"before {readme.BEGIN}\n{readme.section()}\n{readme.END} after"


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no section"):
        readme.rewritten("nothing")
