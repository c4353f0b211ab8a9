"""The JSON writer of all files of numbers."""

from __future__ import annotations

import json
import math

import pytest

from gradl1_fast import _json
from tests.test_imports import PACKAGE

BENCH = PACKAGE.parent / "bench"
# The benchmark's processes talk through a pipe.
PIPES = [BENCH / name for name in ("processes.py", "worker.py", "exported.py", "openvino_worker.py")]
APART = [PACKAGE / "_json.py", *PIPES]


def strictly(text: str) -> object:
    return json.loads(text, parse_constant=pytest.fail)


def test_a_number_that_is_not_finite_is_null_at_any_depth() -> None:
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": math.nan}
    assert strictly(_json.dumps(value)) == {"a": [1.5, None, [None, {"b": None}]], "c": None}


@pytest.mark.parametrize("value", [0, 1.5, True, None, "±NaN", [], {}, {"1": [1e-300, -0.0]}])
def test_other_values_are_unchanged(value: object) -> None:
    assert strictly(_json.dumps(value)) == value


def test_no_other_module_writes_json() -> None:
    sources = {*PACKAGE.rglob("*.py"), *BENCH.rglob("*.py")} - {*APART}
    texts = {path: path.read_text(encoding="utf-8").replace("_json.dumps", "") for path in sources}
    assert not [str(path) for path, text in texts.items() if "json.dump" in text]
