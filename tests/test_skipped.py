from __future__ import annotations

import pytest

from tests.skipped import table


def _skipped(nodeid: str, reason: str) -> pytest.TestReport:
    place = ("tests/x.py", 1, f"Skipped: {reason}")
    return pytest.TestReport(nodeid, ("", None, ""), {}, "skipped", place, "setup")


def test_a_line_counts_what_a_folder_skipped_for_a_reason() -> None:
    names = ["tests/gpu/test_a.py::test_x", "tests/gpu/test_b.py::test_y[1]", "tests/test_c.py::test_z"]
    reports = [_skipped(names[0], "no GPU"), _skipped(names[1], "no GPU"), _skipped(names[2], "no nvcc")]
    assert table(reports) == ["2  tests/gpu        no GPU", "1  tests/test_c.py  no nvcc"]
    assert table([]) == []
