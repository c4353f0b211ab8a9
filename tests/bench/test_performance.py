"""The documentation's figures of speed are what the committed results give."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import performance, results


def test_the_page_is_up_to_date() -> None:
    assert performance.PAGE.read_text() == performance.page(), "run python -m bench.performance"


def test_each_table_shows_five_providers_and_folds_the_rest() -> None:
    for part in performance.page().split("### ")[1:]:
        if "plain training step" in part:
            shown, _, folded = part.partition("<details")
            assert shown.count("\n| ") == 1 + 5  # with the header
            assert "\n| JAX" in folded or "\n| finite" in folded


def test_the_charts_of_the_page_are_there() -> None:
    links = re.findall(r"\]\(\.\./([^)]+\.svg)\)", performance.page())
    assert len(links) > 4
    assert all((performance.HERE / link).is_file() for link in links)


def test_the_first_page_is_up_to_date() -> None:
    text = performance.INDEX.read_text()
    assert performance.rewritten(text) == text, "run python -m bench.performance"


def test_other_results_give_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sorted(performance.RESULTS.glob("*/step"))[0].parent
    other = tmp_path / "bench" / "results" / folder.name
    shutil.copytree(folder / "step", other / "step")
    rows = results.read(other / "step")
    for row in rows:
        if (row["provider"], row["operation"]) == ("gradl1_fast", "resnet18") and row["ratio_to_plain"]:
            row.update(ratio_to_plain=9.87, peak_bytes=None, median_ms=1.0)
    results.write_json(other / "step" / "rows.json", rows)
    before = performance.page()
    monkeypatch.setattr(performance, "HERE", tmp_path)
    monkeypatch.setattr(performance, "RESULTS", other.parent)
    page = performance.page()
    assert "9.87" not in before
    assert "| 9.87 |" in page
    assert "| 9.87 |" in performance.rewritten(performance.INDEX.read_text())
    assert "### How it grows" not in page  # there are none of these here


def devices() -> set[str]:
    folders = performance.RESULTS.glob("*/step")
    return {row["device"] for folder in folders for row in results.read(folder)}


def test_device_date_and_revision_are_those_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sorted(performance.RESULTS.glob("*/step"))[0].parent
    other = tmp_path / "bench" / "results" / "a-gpu"
    shutil.copytree(folder / "step", other / "step")
    results.write_json(
        other / "step" / "rows.json", [{**r, "device": "cuda"} for r in results.read(folder / "step")]
    )
    environment = results.read_environment(folder / "step")
    environment["devices"]["cuda:0"] = "a GPU"
    environment["measured"] = {"date": "2026-01-02", "revision": "abc123"}
    (other / "step" / "environment.json").write_text(json.dumps(environment))
    before, on_cpus = performance.page(), devices() == {"cpu"}
    monkeypatch.setattr(performance, "HERE", tmp_path)
    monkeypatch.setattr(performance, "RESULTS", other.parent)
    page = performance.page()
    assert ("CPU only" in before) == on_cpus
    assert "CPU only" not in page
    assert "## a GPU" in page
    assert "Measured on 2026-01-02, revision abc123." in page
    assert "*a GPU. [" in performance.rewritten(performance.INDEX.read_text())


def test_a_first_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no section between"):
        performance.rewritten("# gradl1_fast")
