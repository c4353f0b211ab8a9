"""Long matrices of cases: `make full` runs all of them and `make test` a part."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

__all__ = ["FULL", "thinned"]

FULL = os.environ.get("GRADL1_TEST_FULL") == "1"

# Of each test function below a path, `make test` runs one case in so many.
EVERY = {"tests/triton/interpreted/": 6}


def thinned(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests to run and those to leave to `make full`; the first case of a function always runs."""
    counts: defaultdict[str, int] = defaultdict(int)
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        every = next((n for path, n in EVERY.items() if item.nodeid.startswith(path)), 1)
        function = item.nodeid.partition("[")[0]
        (kept if FULL or counts[function] % every == 0 else left).append(item)
        counts[function] += 1
    return kept, left
