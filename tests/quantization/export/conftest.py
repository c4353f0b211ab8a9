"""Loads PyTorch's ONNX translations once for all exports, since loading takes a second or two."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def translations_are_read_once() -> Iterator[None]:
    """Give each export a copy of the same table."""
    registry = getattr(
        importlib.import_module("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None
    )
    if not hasattr(registry, "from_torchlib"):  # of another PyTorch
        yield
        return
    read = functools.cache(registry.from_torchlib)

    def copied(*args: Any, **options: Any) -> Any:
        table = copy.copy(read(*args, **options))
        table.functions = {name: list(entries) for name, entries in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(copied))
        yield
