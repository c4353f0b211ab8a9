"""A watch over a model while its forward pass is recorded: it must leave no trace in the model."""

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
    """The model's forward pass cannot be taken as one graph; the message says why."""


@contextlib.contextmanager
def unchanged(tree: nn.Module) -> Iterator[Watched]:
    """Refuse, and undo, what the code inside does to the model: a graph would not do it again.

    No operation on a real tensor is allowed. Attributes are watched, and the lists, dictionaries, sets and
    deques in them; what is inside other objects is not.

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
    """Refuse, and undo, what the code inside does to the attributes of modules.

    Args:
        tree: the modules to watch.
        known: what they hold, from a watch over a larger tree that is still going on: to copy everything
            once more at each level would take most of the time of a conversion.

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
    """Undo what the code inside does to the attributes of modules."""
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
    """The attributes of a module, and what the containers in them held.

    Attributes:
        path: of the module, with a dot behind it.
        attributes: the table itself.
        before: a copy of the table.
        containers: by identity, the attribute that a container is in, itself, and its content.
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
        """Raise if anything is not as it was."""
        changed = [k for k in (*self.attributes, *self.before) if not _same(self.attributes, self.before, k)]
        changed += [name for name, value, content in self.containers.values() if not _holds(value, content)]
        if any(name.startswith("_tensor_constant") for name in changed):  # which fx puts there
            raise NotTraceableError("its forward pass creates a tensor that does not depend on its input")
        if changed:
            raise NotTraceableError(f"its forward pass changes {self.path}{changed[0]}")

    def restore(self) -> None:
        """Put everything back."""
        self.attributes.clear()
        self.attributes.update(self.before)
        for _, value, content in self.containers.values():
            if not _holds(value, content):
                value.clear()
                (value.update if isinstance(value, dict | set) else value.extend)(content)


Watched = dict[nn.Module, _Module]


def _same(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    return key in one and key in other and one[key] is other[key]


def _content(value: Any) -> Any:
    """Return what a container holds; to copy it as its class does takes ten times as long."""
    kind = next((kind for kind in (dict, set) if isinstance(value, kind)), list)
    return kind(value)


def _holds(value: Any, content: Any) -> bool:
    """Return whether a container holds the very objects that it held; values are not compared."""
    if isinstance(value, set):
        return value == content  # in whatever order
    if isinstance(value, dict):
        return list(value) == list(content) and all(value[key] is content[key] for key in value)
    return len(value) == len(content) and all(a is b for a, b in zip(value, content, strict=True))


class _NoTensors(TorchDispatchMode):
    """Refuses every operation: what is computed while a model is traced would be computed once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotTraceableError(f"it computes {func.overloadpacket.__name__} independently of its input")


def _memory(tensor: Tensor) -> int | None:
    """Return what stands for the memory of a tensor; None for a sparse one, which has none of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
