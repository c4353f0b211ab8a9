"""Reads the few kinds of values that a pickled data set needs, and executes nothing that a pickle asks for.

A pickle names functions to be called. Here every name but those of a numpy array of bytes is an error,
and those are answered by stand-ins of this module that only take notes; numpy itself is never called.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import pickletools
from typing import Any

import torch
from torch import Tensor

__all__ = ["UnsafePickleError", "read_pickle"]


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names something that data do not need; the message says what."""


class _Notes:
    """Stands for an array or its type: remembers what it was made with, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Notes):
    """Stands for ``numpy.ndarray``, and for the function that makes an empty one."""


class _Type(_Notes):
    """Stands for ``numpy.dtype``."""


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """Stand for ``_codecs.encode``, by which old pickles hold bytes."""
    if encoding not in ("latin1", "latin-1", "utf-8") or not isinstance(text, str):
        raise UnsafePickleError(f"encodes by {encoding!r}")
    return codecs.encode(text, encoding)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"asks for {module}.{name}, which data do not need; nothing was executed")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("asks for an object outside the file; nothing was executed")


def read_pickle(content: bytes) -> Any:
    """Return a value made of dictionaries, lists, texts, numbers and arrays of bytes, as tensors of uint8.

    Raises:
        UnsafePickleError: the pickle asks for anything else.
        pickle.UnpicklingError: it is damaged.
    """
    try:
        _check_operations(content)
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return _plain(value, {})
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__}: {error}") from error


def _check_operations(content: bytes) -> None:
    """Look for what would take memory for more than the pickle holds: counts and places of any size."""
    for operation, argument, _ in pickletools.genops(content):  # raises where there are fewer bytes than said
        place = argument if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") else 0
        if place is not None and place > len(content):
            raise UnsafePickleError(f"claims {place} values, more than the file has bytes")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return a value without stand-ins; what stands in several places is looked at once."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        done[id(value)] = {key: _plain(inner, done) for key, inner in value.items()}
        return done[id(value)]
    if isinstance(value, list | tuple):
        done[id(value)] = [_plain(inner, done) for inner in value]
        return done[id(value)]
    if isinstance(value, _Array):
        return _tensor(value)
    if isinstance(value, _Notes) or callable(value):
        raise UnsafePickleError("holds a part of an array by itself")
    return value


def _tensor(array: _Array) -> Tensor:
    """Return what numpy would have made of the notes: (version, shape, type, Fortran order, bytes)."""
    if not isinstance(array.state, tuple) or len(array.state) != 5:
        raise UnsafePickleError("holds an array without its values")
    _, shape, kind, fortran, content = array.state
    if not isinstance(kind, _Type) or not kind.args or kind.args[0] not in ("u1", b"u1", "uint8"):
        raise UnsafePickleError("holds an array that is not of unsigned bytes")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise UnsafePickleError(f"holds an array of shape {shape!r}")
    if not isinstance(content, bytes) or len(content) != math.prod(shape):
        raise UnsafePickleError("holds an array with more or fewer bytes than its shape says")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
    if fortran:
        return values.reshape(shape[::-1]).permute(*range(len(shape))[::-1]).contiguous()
    return values.reshape(shape)
