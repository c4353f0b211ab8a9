"""Compatible packages: the packages that `make` installs can be imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.parametrize("package", ["lightning", "torchvision"])
def test_an_installed_package_can_be_imported(package: str) -> None:
    """Lightning imports torchvision where it is installed, which fails unless it is of the build of torch."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run = subprocess.run(
        [sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
