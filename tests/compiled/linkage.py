"""What a built module asks of the machine that loads it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# Libraries and symbols that would tie a wheel to one torch, to a GPU's driver or to a second thread pool.
LIBRARIES = ("torch", "c10", "cuda", "cudart", "nvrtc", "gomp", "iomp", "libomp")
SYMBOLS = ("torch", "c10", "at::", "_ZN2at", "GOMP", "omp_", "cuda", "cuLaunch", "cuInit")


def assert_runs_anywhere(module: Path) -> None:
    """Check that the module needs no such library and leaves no such symbol to be found at load."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    needed = [line for line in _read(module, "--dynamic") if "(NEEDED)" in line]
    undefined = [line.split()[-1] for line in _read(module, "--dyn-syms") if " UND " in line]
    assert any("libc.so" in line for line in needed)
    assert any(name.startswith("Py") for name in undefined)
    assert not [line for line in needed if any(name in line for name in LIBRARIES)]
    assert not [symbol for symbol in undefined if any(name in symbol for name in SYMBOLS)]


def _read(module: Path, what: str) -> list[str]:
    command = ["readelf", what, "--wide", str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
