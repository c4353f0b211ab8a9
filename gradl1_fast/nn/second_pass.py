"""Helpers for a second pass over a batch: moved weights, restored buffers, the same random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["RandomState", "buffers_kept", "random_state_kept", "shifted"]


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


class _Generators(TorchFunctionMode):
    """Records the state of each generator that is passed to a function, before the function draws."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[torch.Generator, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator) and value not in self._states:
                self._states[value] = value.get_state()
        return func(*args, **kwargs)

    def replay(self) -> None:
        """Restore the recorded states."""
        for generator, state in self._states.items():
            generator.set_state(state)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the default generators, and those that were passed to functions, after the block."""
    randomness, generators = RandomState(), _Generators()
    try:
        with generators:
            yield
    finally:
        generators.replay()
        randomness.replay()


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
