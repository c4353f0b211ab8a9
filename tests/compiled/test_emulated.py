"""CUDA launchers and CPU loops under g++: indices, sums; `make sanitize` adds bounds, undefined behaviour."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.compiled.builds import ROOT, emulated
from tests.full import FULL

SANITIZE = os.environ.get("GRADL1_TEST_SANITIZE") == "1"


# CI runs the second under sanitizers too; `GRADL1_TEST_FULL=1 make sanitize` runs all there.
TYPES = ["float32", *(["bfloat16"] if SANITIZE or FULL else []), *(["float64", "float16"] if FULL else [])]


@pytest.mark.parametrize("dtype", TYPES)
def test_both_halves_agree_with_the_reference(dtype: str) -> None:
    runtimes = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "LD_PRELOAD": " ".join(runtimes) if SANITIZE else "",
        # Python and torch keep memory until the end; fibers have stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled.emulated_matrix", str(emulated(SANITIZE)), dtype],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "cuda" in done.stdout
