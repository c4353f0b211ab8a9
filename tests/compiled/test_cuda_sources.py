"""Every .cu compiles without warnings and without spills that matter.

For sm_90 by default; ``make kernels`` compiles for every default architecture, which takes minutes.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.compiled.builds import build
from tests.compiled.ptxas import kernels
from tests.compiled.test_setup import setup_script


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_kernels_compile_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = shutil.which("nvcc")
    every = os.environ.get("GRADL1_TEST_ARCHS") == "all"
    archs = setup_script()["architectures"](nvcc) if every else "90-real"
    options = ["-DGRADL1_HOST=OFF", "-DGRADL1_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    _, log = build("cuda", *options, f"-DGRADL1_CUDA_ARCHS={archs}")
    found = kernels(log)
    if not found:
        pytest.skip("nothing was compiled: the build of an earlier run is up to date")
    hot = [k for k in found if k.hot]
    with capsys.disabled():
        print(f"\n{len(found)} kernels for {archs}; registers of the widest: {max(k.registers for k in hot)}")
    assert len({k.architecture for k in found}) == archs.count(";") + 1
    assert not [k for k in hot if k.spilled]
