"""The state of a container that a plan depends on: modules, attributes, hooks, modes and values outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from gradl1_fast.conversion.outside import Values, form
from gradl1_fast.conversion.trace import is_leaf
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.layers import QuantizedLayer

__all__ = ["Snapshot", "layers_in"]

# Attributes of every module, which do not affect its result or are compared separately.
_EXCLUDED = {*vars(nn.Module()), "_compiled_call_impl"} - {"_parameters", "_buffers"}


class Snapshot:
    """The state of a container when its forward pass was traced.

    Args:
        container: the module.

    Attributes:
        has_hooks: whether a module has hooks, or a ``forward`` that was replaced on the instance.
        layers: the layers of this library.
    """

    def __init__(self, container: nn.Module) -> None:
        modules = list(container.modules())
        self.has_hooks = any(has_hooks(m) or has_own_forward(m) for m in modules)
        self.layers = layers_in(modules)
        self._entries = [
            (m, type(m), type(m).forward, m.training, tuple(m._modules.values()), _attributes(m))
            for m in modules
        ]
        traced = [m for m in modules if not is_leaf(m)]
        self._values = Values(traced, (value for m in traced for _, value in _of_its_own(m)))

    def holds(self, container: nn.Module) -> bool:
        """Return whether the state is unchanged; called in every armed forward pass."""
        if container is not self._entries[0][0]:
            return False
        for module, kind, forward, training, children, attributes in self._entries:
            if type(module) is not kind or kind.forward is not forward or module.training is not training:
                return False
            if has_hooks(module) or has_own_forward(module):
                return False
            if (module._modules or children) and tuple(module._modules.values()) != children:
                return False
            if attributes is not None and _comparable(module) != attributes:
                return False
        return self._values.hold()


def layers_in(modules: Iterable[nn.Module]) -> list[QuantizedLayer]:
    """Return those modules that are layers of this library."""
    return [module for module in modules if isinstance(module, QuantizedLayer)]


def _attributes(module: nn.Module) -> tuple[Any, ...] | None:
    """Return a comparable form of a container's attributes; None for a leaf."""
    return None if is_leaf(module) else _comparable(module)


def _comparable(module: nn.Module) -> tuple[Any, ...]:
    return tuple([(name, form(value)) for name, value in _of_its_own(module)])


def _of_its_own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(module).items() if name not in _EXCLUDED)
