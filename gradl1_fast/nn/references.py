"""Redirects references to modules in bound methods, closures and containers.

Without redirection, a copy of a module tree would run parts of the original through such attributes: a
``forward`` assigned in ``__init__`` (``self.forward = self.forward_split``), a list of unregistered layers,
or a hook that is a method.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["redirect"]

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def redirect(tree: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Redirect the references of a tree's modules to the modules that replace others, given by identity.

    Attributes are replaced, not changed. A container without such references stays the same object.
    """
    for module in tree.modules():
        for name, value in list(vars(module).items()):
            if name in _TABLES:
                continue
            new = _Redirection(replacements).of(value)
            if new is not value:
                vars(module)[name] = new


class _Redirection:
    """Replaces references in a value, recursively.

    Args:
        replacements: the replacement of a module, by the module's identity.
    """

    def __init__(self, replacements: Mapping[int, nn.Module]) -> None:
        self._replacements = replacements
        self._seen: dict[int, Any] = {}  # keeps the values alive, so that identities stay unique

    def of(self, value: Any) -> Any:
        """Return a value with its references replaced; the same object if there are none."""
        if isinstance(value, nn.Module):
            return self._replacements.get(id(value), value)
        of_kind = _KINDS.get(type(value))
        if of_kind is None:
            return value
        if id(value) not in self._seen:
            self._seen[id(value)] = value, value  # for cyclic references
            self._seen[id(value)] = value, of_kind(self, value)
        return self._seen[id(value)][1]

    def _method(self, value: Any) -> Any:
        owner, function = self.of(value.__self__), self.of(value.__func__)
        same = owner is value.__self__ and function is value.__func__
        return value if same else MethodType(function, owner)

    def _partial(self, value: Any) -> Any:
        parts = value.func, value.args, value.keywords
        func, args, keywords = new = tuple(map(self.of, parts))
        return value if _same(new, parts) else functools.partial(func, *args, **keywords)

    def _function(self, value: Any) -> Any:
        cells = value.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        new = [self.of(content) for content in contents]
        if _same(new, contents):
            return value
        pairs = zip(cells, contents, new, strict=True)
        closure = tuple(cell if a is b else CellType(b) for cell, a, b in pairs)
        copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        copy.__kwdefaults__ = value.__kwdefaults__
        copy.__dict__.update(value.__dict__)
        return functools.update_wrapper(copy, value, updated=())

    def _sequence(self, value: Any) -> Any:
        new = [self.of(item) for item in value]
        return value if _same(new, value) else type(value)(new)

    def _set(self, value: Any) -> Any:
        items = list(value)
        new = [self.of(item) for item in items]
        return value if _same(new, items) else type(value)(new)

    def _mapping(self, value: Any) -> Any:
        keys, values = list(value), list(value.values())
        new_keys, new_values = ([self.of(item) for item in items] for items in (keys, values))
        if _same(new_keys, keys) and _same(new_values, values):
            return value
        return type(value)(zip(new_keys, new_values, strict=True))


_KINDS = {
    MethodType: _Redirection._method,
    functools.partial: _Redirection._partial,
    FunctionType: _Redirection._function,
    list: _Redirection._sequence,
    tuple: _Redirection._sequence,
    set: _Redirection._set,
    frozenset: _Redirection._set,
    dict: _Redirection._mapping,
    OrderedDict: _Redirection._mapping,
}


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an unbound cell
        return None


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
