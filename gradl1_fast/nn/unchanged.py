"""A watch over a model while its forward pass is recorded: it must leave no trace in the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NotTraceableError", "unchanged"]


class NotTraceableError(Exception):
    """The model's forward pass cannot be taken as one graph; the message says why."""


@contextlib.contextmanager
def unchanged(tree: nn.Module) -> Iterator[None]:
    """Refuse, and undo, what the code inside does to the model: a graph would not do it again.

    Raises:
        NotTraceableError: names the parameter, buffer or attribute.
    """
    kept = [(name, module, _copies(vars(module))) for name, module in tree.named_modules()]
    try:
        with _ReadOnly(tree):
            yield
        for name, module, copies in kept:
            changed = [
                key for key in vars(module).keys() | copies.keys() if _differs(vars(module), copies, key)
            ]
            if any(key.startswith("_tensor_constant") for key in changed):  # which fx puts there
                raise NotTraceableError("its forward pass makes a tensor that does not depend on its input")
            if changed:
                raise NotTraceableError(f"its forward pass changes {_path(name, changed[0])}")
    finally:
        for _, module, copies in kept:
            _restore(vars(module), copies)


def _copies(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute, and what it holds if it is a container."""
    return {key: (value, _content(value)) for key, value in attributes.items()}


def _content(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _differs(attributes: dict[str, Any], copies: dict[str, tuple[Any, Any]], key: str) -> bool:
    if key not in attributes or key not in copies:
        return True
    value, content = copies[key]
    return attributes[key] is not value or not _holds(value, content)


def _holds(value: Any, content: Any) -> bool:
    """Return whether a container holds the very objects that it held; values are not compared."""
    if content is None:
        return True
    if isinstance(value, set):
        return value == content
    items = (list(c.items()) if isinstance(c, dict) else [(None, v) for v in c] for c in (value, content))
    now, before = ([(key, id(v)) for key, v in pairs] for pairs in items)
    return now == before


def _restore(attributes: dict[str, Any], copies: dict[str, tuple[Any, Any]]) -> None:
    for key in list(attributes):
        if key not in copies:
            del attributes[key]
    for key, (value, content) in copies.items():
        attributes[key] = value
        if content is not None and not _holds(value, content):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def _path(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write into a tensor of the model."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__()
        named = (*tree.named_parameters(), *tree.named_buffers())
        self._names = {_memory(tensor): name for name, tensor in named}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _written(func, args, kwargs or {}):
            if isinstance(value, Tensor) and _memory(value) in self._names:
                raise NotTraceableError(f"its forward pass changes {self._names[_memory(value)]}")
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operation writes into, as its schema says."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
