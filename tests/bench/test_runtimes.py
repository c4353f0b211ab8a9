"""The latencies in the documentation are those of the committed results, and within the bounds."""

from __future__ import annotations

import pytest

from bench import results, runtimes

FOLDERS = sorted(path.parent for path in runtimes.RESULTS.glob("*/export/rows.json"))


def test_the_page_is_up_to_date() -> None:
    text = runtimes.PAGE.read_text()
    assert runtimes.rewritten(text) == text, "run python -m bench.runtimes"


@pytest.mark.parametrize("network", runtimes.NETWORKS)
def test_files_of_8_bits_are_as_fast_as_those_of_quantize_static(network: str) -> None:
    rows = [r for folder in FOLDERS for r in results.read(folder) if r["operation"] == network]
    ours = [r for r in rows if (r["provider"], r["sweep"]) == ("gradl1_fast (8, 8)", "onnxruntime")]
    assert len(ours) == len(FOLDERS) > 0
    for row in ours:
        assert row["ratio_to_static"] <= 1.1
        assert row["ratio_to_float"] <= 0.5
        assert row["integer_layers"] == row["layers"]
