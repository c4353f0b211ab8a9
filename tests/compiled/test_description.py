"""What the package tells about its compiled extension."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradl1_fast.backends import UnavailableError
from gradl1_fast.backends.compiled import _extension
from gradl1_fast.backends.compiled._sources import fingerprint


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
        "the compiled extension is not installed; install gradl1-fast with a C++ compiler"
    )


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr("importlib.import_module", load)
    assert _extension._load.__wrapped__() == (
        None,
        "the compiled extension cannot be loaded: undefined symbol: x",
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout with one source, whose extension was built from it."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "csrc" / "cuda" / "tap.cu").write_text("x")
    built = SimpleNamespace(__file__="_gradl1.so", sources=fingerprint(tmp_path / "csrc"))
    monkeypatch.setattr(_extension, "_CHECKOUT", tmp_path)
    monkeypatch.setattr("importlib.import_module", lambda name: built)
    return tmp_path


def refusal(checkout: Path) -> str:
    with pytest.warns(UserWarning, match="not used until then"):
        module, reason = _extension._load.__wrapped__()
    assert module is None
    return reason


def test_a_module_built_from_the_sources_is_used(checkout: Path) -> None:
    (checkout / "csrc" / "notes.md").touch()
    assert _extension._load.__wrapped__()[0] is not None


def test_a_module_built_from_other_contents_is_refused_with_the_command_to_build(checkout: Path) -> None:
    (checkout / "csrc" / "cuda" / "tap.cu").write_text("y")
    reason = refusal(checkout)
    assert "_gradl1.so was built from other sources" in reason
    assert f"in {checkout}: pip install --no-deps --editable ." in reason


def test_a_module_built_before_a_source_was_renamed_is_refused(checkout: Path) -> None:
    (checkout / "csrc" / "cuda" / "tap.cu").rename(checkout / "csrc" / "tap.cu")
    refusal(checkout)


def test_a_module_that_does_not_tell_its_sources_is_refused(checkout: Path) -> None:
    built = importlib.import_module(_extension._NAME)
    del built.sources
    refusal(checkout)


@pytest.mark.parametrize("absent", ["csrc/cuda/tap.cu", "pyproject.toml"])
def test_an_installed_package_has_no_sources_to_compare(checkout: Path, absent: str) -> None:
    (checkout / absent).unlink()
    if absent != "pyproject.toml":
        (checkout / "csrc" / "cuda").rmdir()
        (checkout / "csrc").rmdir()
    assert _extension._load.__wrapped__()[0] is not None


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
