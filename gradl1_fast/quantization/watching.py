"""Observes a forward pass: the layer that feeds each batch norm, and other readers of its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.stand_in import METADATA

__all__ = ["Watch", "tensors_of"]


class Watch:
    """Observations of a forward pass.

    Attributes:
        calls: the number of calls of each layer and batch norm, by identity.
        fed: for each call of a batch norm, the layer whose output was its input; None for another tensor.
        read_elsewhere: layers whose output was read by something other than a batch norm.
        weight_read_elsewhere: layers whose parameters were read outside of their calls.
        dimensions: the number of dimensions of each layer's output.
    """

    def __init__(self, layers: Iterable[QuantizedLayer], norms: Iterable[nn.Module]) -> None:
        self.calls = Counter[int]()
        self.fed: dict[int, list[QuantizedLayer | None]] = {}
        self.read_elsewhere: set[int] = set()
        self.weight_read_elsewhere: set[int] = set()
        self.dimensions: dict[int, int] = {}
        self._layers, self._norms = list(layers), list(norms)
        self._outputs: Any = WeakIdKeyDictionary()
        self._owners: Any = WeakIdKeyDictionary()
        for layer in self._layers:
            for parameter in layer.parameters(recurse=False):
                self._owners[parameter] = layer
        self._running: list[QuantizedLayer | None] = []

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run a forward pass and return its result."""
        hooks = [layer.register_forward_pre_hook(self._layer_starts) for layer in self._layers]
        hooks += [layer.register_forward_hook(self._layer_ends) for layer in self._layers]
        hooks += [norm.register_forward_pre_hook(self._norm_starts, with_kwargs=True) for norm in self._norms]
        hooks += [norm.register_forward_hook(lambda *_: self._end()) for norm in self._norms]
        try:
            with _Functions(self.see), _Operations(self.see):
                result = forward()
        finally:
            for hook in hooks:
                hook.remove()
        self.see(tensors_of(result))
        return result

    def see(self, values: Iterable[Any]) -> None:
        """Record tensors that are being read."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            producer, owner = self._outputs.get(value), self._owners.get(value)
            if producer is not None and not self._is_running(producer):
                self.read_elsewhere.add(id(producer))
            if owner is not None and not self._is_running(owner):
                self.weight_read_elsewhere.add(id(owner))

    def _is_running(self, layer: QuantizedLayer) -> bool:
        return any(running is layer for running in self._running)

    def _layer_starts(self, layer: Any, _args: Any) -> None:
        self.calls[id(layer)] += 1
        self._running.append(layer)

    def _layer_ends(self, layer: Any, _args: Any, y: Any) -> None:
        self._end()
        if isinstance(y, Tensor):
            self._outputs[y] = layer
            self.dimensions[id(layer)] = y.dim()

    def _norm_starts(self, norm: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        layer = self._outputs.get(x) if isinstance(x, Tensor) else None
        self.calls[id(norm)] += 1
        self.fed.setdefault(id(norm), []).append(layer)
        self._running.append(layer)  # reads by the batch norm itself are expected

    def _end(self) -> None:
        self._running.pop()


class _Functions(TorchFunctionMode):
    """Observes calls of PyTorch functions that do not call an operator, such as reading ``.data``."""

    def __init__(self, see: Callable[[Iterable[Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        is_metadata = name in METADATA or (name == "__get__" and not isinstance(result, Tensor))
        if not is_metadata:
            self._see(tree_leaves((args, kwargs)))
        return result


class _Operations(TorchDispatchMode):
    """Observes operators, including those that are called from C++."""

    def __init__(self, see: Callable[[Iterable[Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a model's output, also in containers, dataclasses and other objects."""
    tensors: list[Tensor] = []
    _collect(value, tensors, set())
    return tensors


def _collect(value: Any, tensors: list[Tensor], visited: set[int]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
        return
    if (
        value is None
        or isinstance(value, str | bytes | int | float | torch.dtype | nn.Module)
        or id(value) in visited
    ):
        return
    visited.add(id(value))
    if isinstance(value, tuple | list | set | frozenset):
        items: Iterable[Any] = value
    else:
        items = value.values() if hasattr(value, "keys") and hasattr(value, "values") else _attributes(value)
    for item in items:
        _collect(item, tensors, visited)


def _attributes(value: Any) -> list[Any]:
    slots = getattr(type(value), "__slots__", ())
    return [*vars(value).values()] if hasattr(value, "__dict__") else [getattr(value, s, None) for s in slots]
