"""Helpers for a second pass over a batch: moved weights, restored buffers, the same random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "buffers_kept", "shifted"]


class RandomState:
    """The state of torch's default random number generators, to be restored later."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def replay(self) -> None:
        """Restore the state of the generators."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore every buffer after the block, since a second pass is not a training step."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextlib.contextmanager
def shifted(weight: Tensor, by: Tensor) -> Iterator[None]:
    """Move a weight for the block, then restore its exact values."""
    value = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(by)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(value)
