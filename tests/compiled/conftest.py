from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gradl1_fast.backends import UnavailableError, backend, resolve
from gradl1_fast.backends.compiled._extension import engine
from tests.compiled.builds import emulated
from tests.compiled.emulated_matrix import PARTS, load


@pytest.fixture
def host() -> Iterator[ModuleType]:
    """Compute with the CPU loops inside the test; memory that is not written stays NaN."""
    try:
        with backend("host"):
            sweeps = resolve("tap", torch.zeros(()))
            torch.use_deterministic_algorithms(True)  # fills new memory with NaN
            yield sweeps
    except UnavailableError as reason:
        pytest.skip(str(reason))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def loops(host: ModuleType) -> Any:
    """The module's functions themselves, as the package calls them."""
    return engine("host")


@pytest.fixture
def module(loops: Any) -> Iterator[Any]:
    """The module; the instruction set in use is restored."""
    from gradl1_fast.backends.compiled import _gradl1

    used = _gradl1.instruction_set()
    yield _gradl1
    _gradl1.use_instruction_set(used)


@pytest.fixture(params=["host", "cuda"])
def emulated_half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Send the sweeps of the package to a half of the module that is compiled for the CPU alone."""
    path, half = emulated(), request.param
    module = load(str(path))
    for part in PARTS:
        monkeypatch.setattr(f"{part}.engine_for", lambda x: getattr(module, half), raising=False)
        monkeypatch.setattr(f"{part}.where", lambda x: (0, 0), raising=False)
    return path, half
