"""The page of results of all methods equals the committed rows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from docs_site import accuracy, method_figures, methods_results

WIDTHS = [(None, None), (8, 8), (4, 4), (3, 3), (2, 4)]


def kept(**top1: float) -> dict[str, Any]:
    """Return results whose accuracies are those given, less a point a regime."""
    rows = [
        {"method": method, "seed": 0, "regime": regime, "w": w, "a": a, "top1": value - i}
        for method, value in top1.items()
        for i, regime in enumerate(("per tensor", "calibrated"))
        for w, a in WIDTHS
    ]
    rows.append({"method": "cpq_4", "seed": 0, "regime": "own quantizer", "w": 4, "a": 4, "top1": 77.0})
    rows = [row | {"method": row["method"].replace("_", "-")} for row in rows]
    seconds = {f"{row['method']} 0": 10.0 if row["method"] == "plain" else 15.0 for row in rows}
    return {"rows": rows, "cpu_seconds": seconds, "settings": {"model": {"name": "net"}}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "read", lambda name: kept(plain=80.0, kure=82.0, cpq_4=75.5))
    monkeypatch.setattr(accuracy, "exists", lambda name: name == "methods-fashion-mnist")


def test_the_page_is_up_to_date() -> None:
    text = methods_results.PAGE.read_text()
    assert methods_results.rewritten(text) == text, "run python -m docs_site.methods_results"


@pytest.mark.usefixtures("small")
def test_the_table_has_a_line_for_each_method() -> None:
    lines = methods_results.table("methods-fashion-mnist").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| `plain`", "| `kure`", "| `cpq-4`"]
    assert lines[4].endswith("| 74.5 | 74.5 | (4, 4) 77.0 | 1.50 |")


@pytest.mark.usefixtures("small")
def test_a_paragraph_tells_source_reconstruction_and_difference() -> None:
    kure, cpq = methods_results.paragraphs().split("\n\n")
    assert "arXiv 2002.07686; its formulas are published." in kure
    assert "On `net`, in points over plain training: float +2.0, no data (4, 4) +2.0" in kure
    assert "Reconstruction: " in cpq
    assert "free steps (2, 4) -4.5" in cpq


def test_every_sentence_of_a_paragraph_begins_with_a_capital() -> None:
    assert re.findall(r"(?<!et al)\. [a-z]\w*", methods_results.paragraphs()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("draw", [method_figures.gains, method_figures.costs])
def test_the_charts_show_every_method(draw: Any) -> None:
    svg = ET.fromstring(draw())
    titles = [title.text or "" for title in svg.iter("title")]
    for method in ("kure", "cpq-4"):
        assert any(title.startswith(f"{method}: ") for title in titles)
    width = float(svg.attrib["viewBox"].split()[2])
    assert all(0 <= float(circle.attrib["cx"]) <= width for circle in svg.iter("circle"))
