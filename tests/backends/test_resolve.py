"""Which backend computes: by context, by environment variable, automatically."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gradl1_fast import backends
from gradl1_fast.backends import reference
from tests.ops.cases import CASES, Case
from tests.ops.sweeps import sweep

X = torch.zeros(1)


class Recorder(SimpleNamespace):
    """A backend that notes what it was asked for and lets the reference compute it."""

    def __init__(self) -> None:
        super().__init__(called=[])

    def __getattr__(self, sweep: str) -> Any:
        self.called.append(sweep)
        return getattr(reference, sweep)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(backends._LOADERS, "recorder", lambda op, device: recorder)
    return recorder


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    def load(op: str, device: torch.device) -> ModuleType:
        raise backends.UnavailableError(f"no compiler for {op}")

    monkeypatch.setitem(backends._LOADERS, "broken", load)
    monkeypatch.setattr(backends, "_AUTOMATIC", {"cpu": ("broken", "reference")})
    backends._first_that_can.cache_clear()
    yield "broken"
    backends._first_that_can.cache_clear()


def test_the_automatic_choice_on_a_cpu_is_the_compiled_loops_if_built() -> None:
    for op in backends.OPERATIONS:
        try:
            with backends.backend("host"):
                expected = backends.resolve(op, X)
        except backends.UnavailableError:
            expected = reference
        assert backends.resolve(op, X) is expected


def test_the_environment_variable_overrides_the_automatic_choice(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADL1_BACKEND", "recorder")
    assert backends.resolve("conv", X) is recorder


def test_the_context_overrides_the_environment_variable(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADL1_BACKEND", "reference")
    with backends.backend("recorder"):
        assert backends.resolve("conv", X) is recorder
        with backends.backend("reference"):
            assert backends.resolve("conv", X) is reference
        assert backends.resolve("conv", X) is recorder
    assert backends.resolve("conv", X) is reference


def test_context_ends_with_an_exception(recorder: Recorder) -> None:
    with pytest.raises(KeyError), backends.backend("recorder"):
        raise KeyError
    assert backends.resolve("conv", X) is reference


def test_unknown_names_raise_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"backend\(\): unknown backend 'cudnn'; choose one of cuda, triton, host, reference"
    ):
        backends.backend("cudnn").__enter__()
    monkeypatch.setenv("GRADL1_BACKEND", "Reference")
    with pytest.raises(
        ValueError,
        match="GRADL1_BACKEND: unknown backend 'Reference'; choose one of cuda, triton, host, reference",
    ):
        backends.resolve("conv", X)


def test_automatic_choice_falls_back_and_says_why_once(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gradl1_fast"):
        assert [backends.resolve("conv", X) for _ in range(3)] == [reference] * 3
    assert caplog.messages == ["conv on cpu: reference; not broken: no compiler for conv"]


def test_a_backend_requested_by_name_does_not_fall_back(broken: str) -> None:
    with backends.backend(broken), pytest.raises(backends.UnavailableError, match="no compiler for conv"):
        backends.resolve("conv", X)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_pass_is_computed_by_the_chosen_backend(case: Case, recorder: Recorder) -> None:
    with backends.backend("recorder"):
        sweep(case)
    expected = {f"{case.op}_{sweep}" for sweep in ("forward", "backward", "double_backward")}
    # The forward of a tap is the identity, which nobody computes.
    assert set(recorder.called) == expected - {"tap_forward"}


def test_nothing_else_is_called_without_the_context(recorder: Recorder) -> None:
    sweep(CASES[0])
    assert recorder.called == []


def test_the_contract_names_every_pass_of_the_reference() -> None:
    for name in reference.__all__:
        assert any(name.startswith(op) for op in backends.OPERATIONS)
        assert callable(getattr(reference, name))
    for op in backends.OPERATIONS:
        assert f"{op}_double_backward" in reference.__all__
