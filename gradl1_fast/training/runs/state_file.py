"""The state of a training in two files: its tensors in safetensors, everything else in JSON.

In the JSON an object ``{"type": "tensor"}`` is in the place of each tensor, whose name in the other file is
the dotted path to this place. ``{"type": "float", "value": "inf"}`` is a number that JSON does not have.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from gradl1_fast import _files, _json, _safetensors
from gradl1_fast._safetensors import TensorFile

__all__ = ["TENSORS", "VALUES", "read_state", "write_state"]

TENSORS, VALUES = "state.safetensors", "state.json"
FORMAT = {"format": "gradl1_fast.training_state", "version": "1"}
_TENSOR = {"type": "tensor"}
_NOT_FINITE = ("inf", "-inf", "nan")
_MEASURED = ("seen", "rows")  # may be infinite: a step with an infinite loss is skipped with float16
_LARGEST = 2**64


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as two files in a folder.

    Args:
        folder: which exists.
        state: a dictionary of tensors, numbers, strings, None, and lists and dictionaries of them. Keys are
            read back as strings, tuples as lists.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    values = _take_tensors(state, "", tensors)
    _safetensors.save(folder / TENSORS, tensors, FORMAT, what="checkpoints", extra="train")
    _files.write_text(folder / VALUES, _json.dumps(values))


def read_state(folder: Path) -> dict[str, Any]:
    """Return what :func:`write_state` wrote, with tensors on the CPU.

    Numbers and tensors are finite, except in the entries ``seen`` and ``rows``.

    Raises:
        ValueError: a file is damaged, or does not belong to the other one; the message names file and entry.
        OSError: one cannot be read.
    """
    values = _read_values(folder / VALUES)
    with TensorFile(folder / TENSORS) as file:
        file.check_metadata(FORMAT)
        try:
            state = {key: _put_tensors(value, key, file, folder / VALUES) for key, value in values.items()}
        except RecursionError as error:
            raise ValueError(f"{folder / VALUES}: truncated or corrupt: nested too deeply") from error
        file.check_that_all_are_known()
    return state


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value with marks in the places of its tensors, which are put into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return _TENSOR
    if isinstance(value, dict):
        return {str(key): _take_tensors(inner, _inside(name, key), tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(inner, _inside(name, i), tensors) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "float", "value": str(value)}
    return value


def _inside(name: str, key: object) -> str:
    return f"{name}.{key}" if name else f"{key}"


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a wrong encoding, a wrong syntax; nested without end
        raise ValueError(f"{path}: truncated or corrupt JSON file: {error!s:.300}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold an object, got {type(values).__name__}")
    return values


def _put_tensors(value: Any, name: str, file: TensorFile, path: Path) -> Any:
    """Return a value of the JSON file with its tensors in their places."""
    measured = name.split(".")[0] in _MEASURED
    if value == _TENSOR:
        return _read_once(file, name, finite=not measured)
    if isinstance(value, dict):
        if measured and value.keys() == {"type", "value"} and value["value"] in _NOT_FINITE:
            return float(value["value"])
        return {key: _put_tensors(inner, f"{name}.{key}", file, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_tensors(inner, f"{name}.{i}", file, path) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):  # JSON as Python reads it has NaN and Infinity
        raise ValueError(f"{path}: entry {name!r:.200} holds NaN or infinity")
    if type(value) is int and abs(value) >= _LARGEST:
        raise ValueError(f"{path}: entry {name!r:.200} is a number of more than 64 bits")
    return value


def _read_once(file: TensorFile, name: str, *, finite: bool) -> Tensor:
    """Return a tensor, which is in one place: otherwise a small file could ask for any amount of memory."""
    if file.was_read(name):
        raise file.error(name, "must be in one place", "several")
    return file.read(name, finite=finite)
