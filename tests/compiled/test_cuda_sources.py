"""The CUDA kernels compile for every default architecture without warnings and without spills that matter.

And the module that comes of it depends on nothing it should not, and says what it cannot do without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compiled.builds import build, module_in
from tests.compiled.linkage import assert_runs_anywhere
from tests.compiled.ptxas import kernels
from tests.compiled.test_setup import setup_script
from tests.full import FULL

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@pytest.fixture(scope="module")
def built() -> tuple[Path, str, list[str]]:
    """Return the module, what the compiler said, and the architectures."""
    nvcc = shutil.which("nvcc")
    archs = setup_script()["architectures"](nvcc)
    if not FULL:  # the oldest, with its PTX, which newer ones compile
        archs = archs.split(";")[0]
    options = ["-DGRADL1_HOST=OFF", "-DGRADL1_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    folder, log = build("cuda", *options, f"-DGRADL1_CUDA_ARCHS={archs}")
    return module_in(folder), log, archs.split(";")


def test_kernels_compile_without_spills(
    built: tuple[Path, str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, log, archs = built
    found = kernels(log)
    if not found:
        pytest.skip(
            "nothing was compiled: the build of an earlier run is up to date; `make kernels` compiles"
        )
    hot = [k for k in found if k.hot]
    with capsys.disabled():
        print()
        for arch in archs:
            widest = max((k for k in hot if k.architecture == f"sm_{arch}"), key=lambda k: k.registers)
            print(f"sm_{arch}: at most {widest.registers} registers, in {widest.name}")
    assert {k.architecture for k in found} == {f"sm_{arch}" for arch in archs}
    assert hot
    assert not [k for k in hot if k.spilled]


def test_the_cuda_module_names_no_torch_and_no_driver(built: tuple[Path, str, list[str]]) -> None:
    assert_runs_anywhere(built[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a driver")
def test_without_a_driver_a_launch_names_its_kernel(built: tuple[Path, str, list[str]]) -> None:
    code = (
        "import importlib.util as u, array\n"
        f"s = u.spec_from_file_location('_gradl1', {str(built[0])!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "x, room = array.array('f', [1] * 8), array.array('d', [0] * 99)\n"
        "span = lambda a: (a.buffer_info()[0], len(a) * a.itemsize)\n"
        "settings = {'dtype': 0, 'layout': (1, 1, 8)}\n"
        "try: m.cuda.tap_backward((0, 0), settings, dy=span(x), l1=span(x), scratch=span(room))\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert done.stdout.startswith("tap_backward: "), done.stdout
    assert "CUDA" in done.stdout
