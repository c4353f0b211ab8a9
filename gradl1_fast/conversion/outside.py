"""The values that the code of a container reads and that belong to no module: numbers in objects and globals.

A trace freezes such a value. A :class:`Values` notices that it has changed.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Values", "form"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_COLLECTIONS = (Mapping, list, tuple, set, frozenset)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
_SMALL_ARRAY = 4096  # bytes that are compared by value


def form(value: Any) -> Any:
    """Return a simple value, the items of a collection as a tuple, or the identity of another object."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Mapping):
        return tuple([(_entry(k), _entry(v)) for k, v in value.items()])
    if isinstance(value, _COLLECTIONS):
        return tuple(map(_entry, value))
    if _is_of_numpy(value) and getattr(value, "nbytes", _SMALL_ARRAY + 1) <= _SMALL_ARRAY:
        return value.tobytes()
    return id(value)


def _is_of_numpy(value: Any) -> bool:
    return type(value).__module__ == "numpy"


def _entry(value: Any) -> Any:
    return value if isinstance(value, _SIMPLE) else id(value)


class Values:
    """The values that are read outside of modules: of objects in attributes, globals, closures and classes.

    Args:
        modules: the modules whose ``forward`` is traced.
        attributes: their attributes.
    """

    def __init__(self, modules: Iterable[nn.Module], attributes: Iterable[Any]) -> None:
        names = list(_names_read(modules))
        self._names = [(owner, name, form(owner.get(name))) for owner, name in names]
        found: dict[int, Any] = {}
        read = [owner.get(name) for owner, name in names]
        for value in [*attributes, *read]:  # their own items are compared with them
            for item in _items(value) if isinstance(value, _COLLECTIONS) else [value]:
                _collect(item, found)
        self._objects = [(value, form(_content(value))) for value in found.values()]

    def hold(self) -> bool:
        """Return whether no value has changed."""
        return all(form(owner.get(name)) == before for owner, name, before in self._names) and all(
            form(_content(value)) == before for value, before in self._objects
        )


def _content(value: Any) -> Any:
    """Return the items of a collection, or the attributes of an object."""
    if not _is_object(value):
        return value
    slots = getattr(type(value), "__slots__", ())
    named = {name: getattr(value, name, None) for name in ([slots] if isinstance(slots, str) else slots)}
    return {**named, **getattr(value, "__dict__", {})}


def _is_object(value: Any) -> bool:
    """Return whether a value is an ordinary object, whose attributes code may read."""
    if isinstance(value, (*_SIMPLE, *_CODE, *_COLLECTIONS, Tensor, nn.Module)):
        return False
    if type(value).__module__.partition(".")[0] in ("torch", "numpy", "gradl1_fast"):
        return False
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def _collect(value: Any, found: dict[int, Any]) -> None:
    """Add a collection or an object, and those inside of it."""
    is_array = _is_of_numpy(value)
    if id(value) in found or not (isinstance(value, _COLLECTIONS) or is_array or _is_object(value)):
        return
    found[id(value)] = value
    for item in () if is_array else _items(_content(value)):
        _collect(item, found)


def _items(collection: Any) -> list[Any]:
    return list(collection.values() if isinstance(collection, Mapping) else collection)


def _names_read(modules: Iterable[nn.Module]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the names that code of the modules reads, each with the namespace that it is in."""
    seen: set[int] = set()
    for cls in dict.fromkeys(type(module) for module in modules):
        for base in cls.__mro__:
            if not _is_of_torch(base.__module__):
                for name, value in vars(base).items():
                    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    if isinstance(function, types.FunctionType):
                        yield from _names_in(function, seen)
                    elif not name.startswith("__"):
                        yield vars(base), name


def _names_in(function: types.FunctionType, seen: set[int]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the globals and closed-over values that a function, and functions that it calls, read."""
    if id(function) in seen or _is_of_torch(function.__module__ or ""):
        return
    seen.add(id(function))
    for cell in function.__closure__ or ():
        yield _Cell(cell), "contents"
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.FunctionType):
            yield from _names_in(value, seen)
        elif isinstance(value, types.ModuleType | type):
            if not _is_of_torch(getattr(value, "__module__", None) or value.__name__):
                yield from ((vars(value), n) for n in names & vars(value).keys() if _is_data(vars(value)[n]))
        elif _is_data(value):
            yield function.__globals__, name


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_data(value: Any) -> bool:
    return not isinstance(value, _CODE)


def _is_of_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "gradl1_fast")


class _Cell(dict[str, Any]):
    """A cell of a closure as a namespace of one name."""

    def __init__(self, cell: types.CellType) -> None:
        super().__init__()
        self._cell = cell

    def get(self, name: str, default: Any = None) -> Any:
        """Return what the cell holds; None if it is empty."""
        try:
            return self._cell.cell_contents
        except ValueError:
            return default
