"""`make test` samples the long matrices: every value of every parameter runs, and so does the first case."""

from __future__ import annotations

import itertools

import pytest

from tests import full

pytest_plugins = ["pytester"]

# One case in three of the list of `test_matrix` has one dtype.
SOURCE = """
import pytest

@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("layout", ["a", "b", "c", "d", "e"])
@pytest.mark.parametrize("case", [[i] for i in range(7)], ids=str)
def test_matrix(case, layout, dtype):
    pass

@pytest.mark.parametrize(("kind", "size"), [([i], i) for i in range(9)])
def test_pairs(kind, size):
    pass

@pytest.mark.parametrize("dtype", [0, 1, 2, 3])
def test_few(dtype):
    pass

@pytest.mark.parametrize("case", range(5))
def test_other(case):
    pass

def test_alone():
    pass
"""
EVERY = {"test_matrix": 3, "test_pairs": 4, "test_few": 6, "test_alone": 2}
Functions = dict[str, list[pytest.Item]]


@pytest.fixture
def functions(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Functions:
    """Return the cases of each function; of some, one in N is to run."""
    found: Functions = {}
    for item in pytester.getitems(SOURCE):
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    (path,) = {name.partition("::")[0] for name in found}
    monkeypatch.setattr(full, "FULL", False)
    monkeypatch.setattr(full, "EVERY", {f"{path}::{name}": n for name, n in EVERY.items()})
    return {name.rpartition("_")[2]: cases for name, cases in found.items()}


def test_each_value_meets_several_of_the_others(functions: Functions) -> None:
    cases = functions["matrix"]
    kept, left = full.thinned(cases)
    assert kept[0] is cases[0]
    assert len(kept) == len(cases) / 3
    assert sorted(kept + left, key=cases.index) == cases
    values = [{name: str(value) for name, value in item.callspec.params.items()} for item in kept]
    for (one, count), (other, _) in itertools.permutations((("case", 7), ("layout", 5), ("dtype", 3)), 2):
        met = {(v[one], v[other]) for v in values}
        assert len({value for value, _ in met}) == count
        assert len(met) > count


def test_each_value_of_a_short_parameter_runs(functions: Functions) -> None:
    assert full.thinned(functions["few"]) == (functions["few"], [])


def test_parameters_that_change_together_count_once(functions: Functions) -> None:
    assert full.thinned(functions["pairs"])[0] == functions["pairs"][::4]


def test_other_tests_and_those_without_cases_all_run(functions: Functions) -> None:
    cases = functions["other"] + functions["alone"]
    assert full.thinned(cases) == (cases, [])


def test_make_full_runs_every_case(functions: Functions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "FULL", True)
    cases = [case for name in functions for case in functions[name]]
    assert full.thinned(cases) == (cases, [])
