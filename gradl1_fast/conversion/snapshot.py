"""The state of a container for which a plan was made: its modules, their attributes, hooks and modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gradl1_fast.conversion.trace import is_leaf
from gradl1_fast.nn.hooks import has_hooks, has_own_forward

__all__ = ["Snapshot"]

_SIMPLE = (bool, int, float, str, type(None))
_CHANGING = {"_compiled_call_impl"}  # of an instance, and no part of what it computes


@dataclass(frozen=True)
class Snapshot:
    """What a container was when its forward pass was traced.

    Attributes:
        state: of each module inside.
        has_hooks: whether a module has hooks, or a ``forward`` that somebody put into its place.
    """

    state: tuple[Any, ...]
    has_hooks: bool

    @classmethod
    def of(cls, container: nn.Module) -> Snapshot:
        """Return the present state."""
        modules = list(container.modules())
        return cls(tuple(map(_state, modules)), any(has_hooks(m) or has_own_forward(m) for m in modules))

    def holds(self, container: nn.Module) -> bool:
        """Return whether nothing has changed."""
        return Snapshot.of(container) == self


def _state(module: nn.Module) -> tuple[Any, ...]:
    mode = type(module), type(module).forward, module.training
    if is_leaf(module):
        return *mode, id(module), *map(id, module._modules.values())
    return *mode, id(module), *((k, _value(v)) for k, v in vars(module).items() if k not in _CHANGING)


def _value(value: Any) -> Any:
    """Return a simple value, those in a container, or what stands for any other object."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, dict):
        return tuple((k if isinstance(k, _SIMPLE) else id(k), _entry(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_entry, value))
    return id(value)


def _entry(value: Any) -> Any:
    return value if isinstance(value, _SIMPLE) else id(value)
