"""Build entry point; everything static is declared in pyproject.toml.

The compiled extension is optional. CMake and Ninja build it: CUDA kernels where nvcc is found, CPU
loops where a C++ compiler is. What cannot be built is left out, with a sentence that says so, unless
``GRADL1_CUDA=1`` or ``GRADL1_HOST=1`` demands it; ``0`` skips it. docs/environment.md has the rest.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

fingerprint = runpy.run_path("gradl1_fast/backends/compiled/_sources.py")["fingerprint"]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def switch(name: str) -> bool | None:
    """Return what the environment demands: True, False, or None for "if possible"."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def find_nvcc() -> str | None:
    """Return the CUDA compiler, if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (os.environ.get("CUDACXX"), home and str(Path(home, "bin", "nvcc")), "nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def architectures(nvcc: str) -> str:
    """Return the architectures to compile for: those asked for, or the default ones nvcc knows."""
    asked = os.environ.get("GRADL1_CUDA_ARCHS")
    if asked:
        if not re.fullmatch(r"native|\d+(;\d+)*", asked):
            raise SystemExit(f"GRADL1_CUDA_ARCHS must be like 90 or 80;90, or native, got {asked!r}")
        return asked
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return ";".join(str(a) for a in ARCHITECTURES if re.search(rf"^sm_{a}$", listed, re.MULTILINE))


class CMakeBuild(build_ext):
    """Build the extension with CMake: all of it, else its CPU half, else nothing."""

    def build_extension(self, ext: Extension) -> None:
        """Try what is wanted, best first."""
        cuda, host = switch("GRADL1_CUDA"), switch("GRADL1_HOST")
        for with_cuda, with_host in self.attempts(cuda, host):
            try:
                return self.build_with(ext, with_cuda, with_host)
            except (subprocess.CalledProcessError, OSError) as error:
                self.left_out(f"{'CUDA kernels' if with_cuda else 'CPU loops'}: {error}")
        if cuda or host:
            raise SystemExit("gradl1_fast: GRADL1_CUDA=1 or GRADL1_HOST=1, but the extension cannot be built")
        self.left_out("compiled extension: the package is installed as pure Python")

    def attempts(self, cuda: bool | None, host: bool | None) -> list[tuple[bool, bool]]:
        """Return pairs (with CUDA, with CPU loops) to try in turn."""
        if cuda is None and find_nvcc() is None:
            self.left_out("CUDA kernels: nvcc was not found")
        tries = [(True, host is not False)] if cuda or (cuda is None and find_nvcc()) else []
        return tries + ([(False, True)] if not cuda and host is not False else [])

    def build_with(self, ext: Extension, cuda: bool, host: bool) -> None:
        """Configure, compile and put the module where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp, "cuda" if cuda else "host").resolve()
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for command in (
            ["cmake", "-S", "csrc", "-B", str(work), "-G", "Ninja", *self.options(cuda, host)],
            ["cmake", "--build", str(work)],
            ["cmake", "--install", str(work), "--prefix", str(target)],
        ):
            subprocess.run(command, check=True)

    def options(self, cuda: bool, host: bool) -> list[str]:
        """Return the arguments of CMake's configuration."""
        import pybind11

        options = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
        options |= {"GRADL1_HOST": "ON" if host else "OFF", "GRADL1_CUDA": "ON" if cuda else "OFF"}
        options["GRADL1_SOURCES"] = fingerprint(Path("csrc"))
        if cuda:
            nvcc = find_nvcc()
            if nvcc is None:
                raise FileNotFoundError("GRADL1_CUDA=1, but nvcc was not found")
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "GRADL1_CUDA_ARCHS": architectures(nvcc)}
        return [f"-D{name}={value}" for name, value in options.items()]

    def left_out(self, what: str) -> None:
        """Say what the installation does without."""
        self.warn(f"gradl1_fast: left out {what}")


def extensions() -> list[Extension]:
    """Return the extension, unless both of its halves are switched off."""
    if switch("GRADL1_CUDA") is False and switch("GRADL1_HOST") is False:
        return []
    return [Extension("gradl1_fast.backends.compiled._gradl1", sources=[], optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
