"""Values in memory: moved to a device, or restored after a trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["on_device", "values_kept"]


def on_device(device: torch.device, value: Any) -> Any:
    """Return a value with the tensors in its dictionaries and lists moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(device, inner) for key, inner in value.items()}
    return [on_device(device, inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def values_kept(model: nn.Module) -> Iterator[None]:
    """Give parameters and buffers back the values, memory and strides that they had before the block."""
    before = {key: (value.detach(), value.detach().clone()) for key, value in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, value in model.state_dict(keep_vars=True).items():
                memory, kept = before[key]
                if not torch.equal(memory, kept):
                    memory.copy_(kept)
                value.data = memory
