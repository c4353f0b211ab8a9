"""What the package tells about its compiled extension."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gradl1_fast.backends import UnavailableError
from gradl1_fast.backends.compiled import _extension


def module(**halves: Any) -> SimpleNamespace:
    return SimpleNamespace(
        compiler="GNU 99.1",
        cuda_compiler="NVIDIA 13",
        cuda_architectures="80 90",
        instruction_sets=lambda: ["avx2", "base"],
        instruction_set=lambda: "base",
        has_team=lambda: False,
        **halves,
    )


def told(monkeypatch: pytest.MonkeyPatch, module: Any, reason: str = "") -> dict[str, str]:
    monkeypatch.setattr(_extension, "_load", lambda: (module, reason))
    return _extension.describe()


def test_of_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = told(monkeypatch, module(host=1, cuda=1))
    assert facts["C++ compiler"] == "GNU 99.1"
    assert facts["CPU loops"] == "base, of avx2, base that this processor can run"
    assert facts["CPU threads"].startswith("one")
    assert (facts["CUDA compiler"], facts["CUDA architectures"]) == ("NVIDIA 13", "80 90")


def test_of_a_half_that_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no nvcc, or GRADL1_CUDA=0" in told(monkeypatch, module(host=1))["CUDA kernels"]
    assert told(monkeypatch, module(cuda=1))["CPU loops"] == "left out when it was built"


def test_of_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, None, "no compiler") == {"built": "no: no compiler"}


def test_of_the_module_that_is_here() -> None:
    facts = _extension.describe()
    assert "built" in facts or {"C++ compiler", "CPU loops"} <= facts.keys()


def test_a_module_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, _extension._NAME, None)
    module, reason = _extension._load.__wrapped__()
    assert module is None
    assert reason.startswith(
        "the compiled extension is not installed; install gradl1-fast where a C++ compiler"
    )


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr("importlib.import_module", load)
    assert _extension._load.__wrapped__() == (
        None,
        "the compiled extension cannot be loaded: undefined symbol: x",
    )


@pytest.mark.parametrize(
    ("present", "message"), [(False, "^no compiler$"), (True, "built without its cuda part")]
)
def test_a_half_that_is_not_there_is_unavailable(
    present: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (module(host=1), "") if present else (None, "no compiler")
    monkeypatch.setattr(_extension, "_load", lambda: found)
    with pytest.raises(UnavailableError, match=message):
        _extension.engine("cuda")
