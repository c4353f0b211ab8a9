"""Long matrices of cases: `make full` runs all of them and `make test` a part."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

__all__ = ["FULL", "thinned"]

FULL = os.environ.get("GRADL1_TEST_FULL") == "1"

# Of each test function below a path, `make test` runs one case in N.
EVERY = {
    "tests/triton/interpreted/": 6,
    "tests/ops/test_layouts.py": 3,
    "tests/ops/test_bad_input.py::test_non_finite_input": 3,
    "tests/ops/test_bad_input.py::test_odd_sizes": 2,
    "tests/penalty/test_compile.py::test_a_compiled_step": 2,
    "tests/penalty/test_compile.py::test_without_tracing": 2,
    "tests/interoperability/test_compile.py::test_a_forward_pass": 2,
}


def thinned(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests to run and those to leave to `make full`; the first case of a function always runs."""
    functions: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    left = set() if FULL else {item for name in functions for item in _left(name, functions[name])}
    return [item for item in items if item not in left], [item for item in items if item in left]


def _left(function: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    every = next((n for path, n in EVERY.items() if function.startswith(path)), 1)
    kept = _sample(_columns(cases), len(cases), every)
    return [case for k, case in enumerate(cases) if k not in kept]


def _columns(cases: list[pytest.Item]) -> list[tuple[int, ...]]:
    """Return for each parameter the number of its value in each case; what changes together counts once."""
    values = [tuple(case.callspec.params.values()) if hasattr(case, "callspec") else () for case in cases]
    return list(dict.fromkeys(_numbers(column) for column in zip(*values, strict=True)))


def _numbers(values: tuple[object, ...]) -> tuple[int, ...]:
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(id(value), len(numbers)) for value in values)  # not all can be hashed


def _sample(columns: list[tuple[int, ...]], count: int, every: int) -> set[int]:
    """Return one diagonal in N of the cases, and each value of a parameter of at most N values.

    One case in N of the list may meet a single value of a parameter, such as one type of tensor.
    """
    kept = {k for k in range(count) if sum(column[k] for column in columns) % every == 0}
    for column in columns:
        if max(column) < every:
            missing = set(column) - {column[k] for k in kept}
            kept |= {column.index(value) for value in missing}
    return kept
