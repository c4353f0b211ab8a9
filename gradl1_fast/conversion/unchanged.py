"""Ensures that tracing a forward pass does not change the model."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NotTraceableError", "Watched", "attributes_restored", "attributes_unchanged", "unchanged"]


class NotTraceableError(Exception):
    """The forward pass cannot be traced as one graph; the message says why."""


@contextlib.contextmanager
def unchanged(tree: nn.Module) -> Iterator[Watched]:
    """Refuse and undo changes to the model inside the block: a graph would not repeat them.

    Operations on real tensors are refused too. Attributes are watched, including the lists, dictionaries,
    sets and deques in them, but not the contents of other objects.

    Raises:
        NotTraceableError: names the operation, parameter, buffer or attribute.
    """
    named = (*tree.named_parameters(), *tree.named_buffers())
    tensors = [(name, t, t.detach()) for name, t in named if _memory(t) is not None]
    try:
        with _NoTensors(), attributes_unchanged(tree) as watched:
            yield watched
        for name, tensor, before in tensors:
            if _memory(tensor) != _memory(before):
                raise NotTraceableError(f"its forward pass changes {name}")
    finally:
        for _, tensor, before in tensors:
            if _memory(tensor) != _memory(before):
                tensor.data = before


@contextlib.contextmanager
def attributes_unchanged(tree: nn.Module, known: Watched | None = None) -> Iterator[Watched]:
    """Refuse and undo changes to the attributes of modules inside the block.

    Args:
        tree: the modules to watch.
        known: the recorded attributes of an enclosing watch over a larger tree. Copying everything again at
            each level would take most of the time of a conversion.

    Raises:
        NotTraceableError: names the attribute.
    """
    modules = _watched(tree) if known is None else {m: known[m] for m in tree.modules() if m in known}
    try:
        yield modules
        for module in modules.values():
            module.check()
    finally:
        for module in modules.values():
            module.restore()


@contextlib.contextmanager
def attributes_restored(tree: nn.Module) -> Iterator[None]:
    """Undo changes to the attributes of modules inside the block."""
    modules = _watched(tree)
    try:
        yield
    finally:
        for module in modules.values():
            module.restore()


def _watched(tree: nn.Module) -> Watched:
    return {m: _Module(f"{name}." if name else "", vars(m)) for name, m in tree.named_modules()}


_WITH_ITEMS = list, dict, set, deque, tuple


@dataclass
class _Module:
    """The attributes of a module, and the contents of the containers in them.

    Attributes:
        path: the path of the module, followed by a dot.
        attributes: the ``__dict__`` of the module.
        before: a copy of it.
        containers: by identity, the name of the attribute, the container, and a copy of its contents.
    """

    path: str
    attributes: dict[str, Any]
    before: dict[str, Any] = field(init=False)
    containers: dict[int, tuple[str, Any, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.before = dict(self.attributes)
        for name, value in self.before.items():
            self._find(name, value)

    def _find(self, name: str, value: Any) -> None:
        if not isinstance(value, _WITH_ITEMS) or id(value) in self.containers:
            return
        if not isinstance(value, tuple):
            self.containers[id(value)] = name, value, _content(value)
        for item in value.values() if isinstance(value, dict) else value:
            self._find(name, item)

    def check(self) -> None:
        """Raise if anything has changed."""
        changed = [k for k in (*self.attributes, *self.before) if not _same(self.attributes, self.before, k)]
        changed += [name for name, value, content in self.containers.values() if not _holds(value, content)]
        if any(name.startswith("_tensor_constant") for name in changed):  # added by fx
            raise NotTraceableError("its forward pass creates a tensor that does not depend on its input")
        if changed:
            raise NotTraceableError(f"its forward pass changes {self.path}{changed[0]}")

    def restore(self) -> None:
        """Restore the attributes and the contents of the containers."""
        self.attributes.clear()
        self.attributes.update(self.before)
        for _, value, content in self.containers.values():
            if not _holds(value, content):
                value.clear()
                (value.update if isinstance(value, dict | set) else value.extend)(content)


Watched = dict[nn.Module, _Module]


def _same(first: dict[str, Any], second: dict[str, Any], key: str) -> bool:
    return key in first and key in second and first[key] is second[key]


def _content(value: Any) -> Any:
    """Return a copy of a container's items; ten times as fast as a copy by its class."""
    kind = next((kind for kind in (dict, set) if isinstance(value, kind)), list)
    return kind(value)


def _holds(value: Any, content: Any) -> bool:
    """Return whether a container still holds the same objects; values are not compared."""
    if isinstance(value, set):
        return value == content  # in any order
    if isinstance(value, dict):
        return list(value) == list(content) and all(value[key] is content[key] for key in value)
    return len(value) == len(content) and all(a is b for a, b in zip(value, content, strict=True))


class _NoTensors(TorchDispatchMode):
    """Refuses every operation: a graph would reuse a result that was computed during tracing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotTraceableError(f"it computes {func.overloadpacket.__name__} independently of its input")


def _memory(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's storage; None for a sparse tensor, which has no single storage."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
