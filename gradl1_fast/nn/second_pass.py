"""What a second pass over one batch needs: moved weights, kept buffers, the same random numbers."""

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
        """Put the generators back to where they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its value back: a second pass is not a training step."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextlib.contextmanager
def shifted(weight: Tensor, by: Tensor) -> Iterator[None]:
    """Move a weight; then it gets back its very values."""
    value = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(by)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(value)
