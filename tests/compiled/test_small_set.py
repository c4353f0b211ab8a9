"""The program that compute-sanitizer watches on a GPU, with the CPU loops."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.gpu import small_set


def test_every_sweep_is_called_and_compared(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    sweeps = {name for name in host.__all__ if not name.startswith(("load", "describe", "prepare_"))}
    for name in sweeps:
        sweep = getattr(host, name)
        monkeypatch.setattr(host, name, lambda *a, f=sweep, n=name: called.add(n) or f(*a))
    said: list[str] = []
    assert small_set.sweep_all("host", torch.device("cpu"), said.append) > 300
    assert called == sweeps
    assert "host" in said[0]
