"""Builds of the extension for tests, kept under build/ between runs and made once for all test processes."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(name: str, *options: str) -> tuple[Path, str]:
    """Configure and compile csrc/ with these CMake options; return the folder and the compiler's output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None or not importlib.util.find_spec("pybind11"):
        pytest.skip("building needs cmake, ninja and pybind11")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("building needs a C++ compiler")
    import pybind11

    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        "-DGRADL1_WERROR=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Without the flags of the make that runs the tests, which ninja would ask for jobs.
        env = os.environ | {"PATH": path, "MAKEFLAGS": ""}
        run([cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *settings, *options], env)
        return folder, run([cmake, "--build", str(folder)], env)


@functools.cache
def emulated(sanitized: bool = False) -> Path:
    """Return the module with both halves for the CPU, where accesses to memory are counted, or checked."""
    options = [
        "-DGRADL1_CUDA=ON",
        "-DGRADL1_EMULATE=ON",
        "-DGRADL1_BASE_ONLY=ON",
        "-DGRADL1_OPTIMISE=-O0",
    ]
    if sanitized:  # takes minutes
        return module_in(build("sanitized", *options, "-DGRADL1_SANITIZE=address,undefined")[0])
    return module_in(build("emulated", *options, "-DGRADL1_COUNT=ON")[0])


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def module_in(folder: Path) -> Path:
    """Return the compiled module in a build folder."""
    return next(folder.glob("_gradl1.*.so"))
