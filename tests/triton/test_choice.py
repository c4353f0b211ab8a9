"""When Triton is chosen, and what it says when it cannot be."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast import backends

X = torch.ones(3)


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_is_installed", lambda package: package != "triton")
    backends._first_that_can.cache_clear()
    yield
    backends._first_that_can.cache_clear()


@pytest.mark.usefixtures("_without_triton")
@pytest.mark.parametrize("op", backends.OPERATIONS)
def test_absent_it_says_what_to_install(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADL1_BACKEND", "triton")
    with pytest.raises(gl.UnavailableError, match="pip install triton"):
        backends.resolve(op, X)


@pytest.mark.usefixtures("_without_triton")
def test_absent_the_reference_computes_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    backends._first_that_can.cache_clear()
    with caplog.at_level(logging.INFO, "gradl1_fast"):
        assert backends._first_that_can("tap", "cuda") is backends.reference
    assert "reference" in caplog.text
    assert "pip install triton" in caplog.text


def test_on_a_cpu_it_is_refused_outside_of_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gl.backend("triton"), pytest.raises(gl.UnavailableError, match="TRITON_INTERPRET=1"):
        gl.functional.l1_norm([X])


def test_on_a_gpu_it_comes_first_except_for_convolution_and_linear(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    backends._first_that_can.cache_clear()
    with caplog.at_level(logging.INFO, "gradl1_fast"):
        chosen = {op: backends._first_that_can(op, "cuda") for op in backends.OPERATIONS}
    for op, module in chosen.items():
        name = "reference" if op in backends.PRODUCTS else "triton"
        assert module.__name__ == f"gradl1_fast.backends.{name}"
        assert f"{op} on cuda: {name}" in caplog.text


def test_on_a_cpu_it_is_not_chosen_even_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve("tap", X).__name__ != "gradl1_fast.backends.triton"


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, gradl1_fast; sys.exit('gradl1_fast.backends.triton' in sys.modules)"
    before = "import sys, torch; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True)
    if "True" not in run.stdout:  # torch itself may import it
        code = code.replace("'gradl1_fast.backends.triton' in", "'triton' in")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
