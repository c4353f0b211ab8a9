"""Runs the files of ``interpreted/`` in processes of their own, where Triton's interpreter computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

HERE = Path(__file__).parent / "interpreted"
FILES = sorted(HERE.glob("test_*.py"))
LONGEST = HERE / "test_batch_norm_act.py"
# Two processes that take about as long; each file in one of its own would import torch and Triton each time.
PROCESSES = {"batch norm": [LONGEST], "others": [file for file in FILES if file != LONGEST]}


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run compiled, in tests/gpu")
@pytest.mark.skipif(
    _numbers(triton.__version__) < (3, 7) and _numbers(numpy.__version__) >= (2, 4),
    reason="the interpreter of this Triton needs NumPy below 2.4",
)
@pytest.mark.parametrize("files", PROCESSES.values(), ids=PROCESSES)
def test_interpreted(files: list[Path]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Nothing of the surrounding run may reach the inner one; to trace the interpreter takes an hour.
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COVERAGE_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    run = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
