"""What setup.py decides: what to build, in which order to try, what to say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import setuptools.command.build_ext
from setuptools import Distribution

from tests.compiled.builds import ROOT

# Other packages import distutils anew, and setuptools then refuses its own classes.
DISTUTILS = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "distutils"}


def setup_script() -> dict[str, Any]:
    """Return the names of setup.py, without setting up anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("GRADL1_CUDA", "GRADL1_HOST", "GRADL1_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, module in DISTUTILS.items():
        monkeypatch.setitem(sys.modules, name, module)
    return setup_script()


def command(script: dict[str, Any], nvcc: str | None, works: Any = lambda cuda, host: True) -> Any:
    """Return the build command, with a compiler that is there or not and builds that work or not."""
    script["CMakeBuild"].attempts.__globals__["find_nvcc"] = lambda: nvcc

    class Tried(script["CMakeBuild"]):  # type: ignore[misc, name-defined]
        tried: list[tuple[bool, bool]]
        said: list[str]

        def build_with(self, ext: Any, cuda: bool, host: bool) -> None:
            self.tried.append((cuda, host))
            if not works(cuda, host):
                raise FileNotFoundError("no compiler")

        def warn(self, message: str) -> None:
            self.said.append(message)

    built = Tried(Distribution())
    built.tried, built.said = [], []
    return built


@pytest.mark.parametrize(
    ("env", "nvcc", "tried"),
    [
        ({}, "nvcc", [(True, True)]),
        ({}, None, [(False, True)]),
        ({"GRADL1_CUDA": "0"}, "nvcc", [(False, True)]),
        ({"GRADL1_CUDA": "1"}, "nvcc", [(True, True)]),
        ({"GRADL1_HOST": "0"}, "nvcc", [(True, False)]),
        ({"GRADL1_HOST": "0"}, None, []),
    ],
)
def test_what_is_tried(
    env: dict[str, str], nvcc: str | None, tried: Any, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    build = command(script, nvcc)
    build.build_extension(None)
    assert build.tried == tried


def test_without_a_compiler_pure_python_is_installed_and_says_so(script: Any) -> None:
    build = command(script, "nvcc", works=lambda cuda, host: False)
    build.build_extension(None)
    assert build.tried == [(True, True), (False, True)]
    assert "pure Python" in build.said[-1]


def test_a_missing_cuda_compiler_is_said(script: Any) -> None:
    build = command(script, None)
    build.build_extension(None)
    assert any("nvcc was not found" in said for said in build.said)


@pytest.mark.parametrize("name", ["GRADL1_CUDA", "GRADL1_HOST"])
def test_what_is_demanded_and_fails_is_an_error(
    name: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match=f"{name}=1"):
        command(script, "nvcc", works=lambda cuda, host: False).build_extension(None)


def test_a_switch_has_three_positions(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADL1_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset"):
        script["switch"]("GRADL1_CUDA")


def test_both_halves_switched_off_leave_no_extension(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADL1_CUDA", "0")
    monkeypatch.setenv("GRADL1_HOST", "0")
    assert script["extensions"]() == []


@pytest.mark.parametrize("chosen", ["90", "80;120", "native"])
def test_architectures_can_be_chosen(chosen: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADL1_CUDA_ARCHS", chosen)
    assert script["architectures"]("no compiler is asked") == chosen


@pytest.mark.parametrize("chosen", ["80,90", "sm_90", "90-real", " "])
def test_a_misspelt_architecture_is_an_error(
    chosen: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADL1_CUDA_ARCHS", chosen)
    with pytest.raises(SystemExit, match="GRADL1_CUDA_ARCHS must be like 90"):
        script["architectures"]("no compiler is asked")


def test_the_default_architectures_are_those_that_the_compiler_knows(script: Any, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\nsm_90a\\nsm_120\\n'\n")
    nvcc.chmod(0o755)
    assert script["architectures"](str(nvcc)) == "80;90;120"
