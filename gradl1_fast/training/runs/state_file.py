"""Reads a state that ``torch.save`` wrote: nothing is executed, and no more memory taken than it holds.

``torch.load(weights_only=True)`` executes nothing, but a few bytes can ask it for any amount of memory: by
a compressed entry, by a call of ``bytearray``, by a tensor with one value and a shape of billions. So the
archive is looked at before, and what came out of it afterwards.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["entries_in", "is_finite", "read_state"]

_BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(OSError, zipfile.BadZipFile),
)
_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
_UNCALLED = ("EXT1", "EXT2", "EXT4", "INST", "STACK_GLOBAL")  # other ways to name what is called
_LARGEST = 2**64
_DEEPEST = 20  # a state has four levels, and an objective may add a few


def read_state(file: Path, device: torch.device) -> dict[str, Any]:
    """Return a dictionary of tensors, numbers, texts, and lists and dictionaries of them.

    Args:
        file: as ``torch.save`` writes it, uncompressed.
        device: where its tensors go.

    Raises:
        ValueError: the file is damaged, or holds or asks for anything else; the message names it.
        OSError: it cannot be read.
    """
    with open(file, "rb") as opened:
        try:
            _check_archive(opened)
            opened.seek(0)
            state = torch.load(opened, map_location=device, weights_only=True)
        except _BROKEN as error:
            reason = f"{error}" or type(error).__name__
            raise ValueError(f"{file}: truncated or corrupt checkpoint: {reason:.300}") from error
        size = os.fstat(opened.fileno()).st_size
    if not isinstance(state, dict):
        raise ValueError(f"{file}: must hold a dictionary, got {type(state).__name__}")
    for count, (name, value) in enumerate(entries_in(file, state)):
        if count > size:  # a list that is in the file once may stand in another many times
            raise ValueError(f"{file}: entry {name!r:.80}: there are more values than the file has bytes")
        _check_value(file, name, value)
    return state


def _check_archive(opened: Any) -> None:
    """Check that an archive holds what it says, and calls nothing but what makes tensors."""
    with zipfile.ZipFile(opened) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("two entries of the archive have one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("an entry of the archive is compressed")
        if sum(entry.file_size for entry in entries) > os.fstat(opened.fileno()).st_size:
            raise ValueError("the archive claims more bytes than the file has")
        wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"the checksum of {wrong} is wrong")
        pickled = [name for name in names if name.endswith("data.pkl")]
        if len(pickled) != 1:
            raise ValueError("the archive holds no state")
        _check_calls(archive.read(pickled[0]))


def _check_calls(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _UNCALLED or (operation.name == "GLOBAL" and argument not in _CALLED):
            raise ValueError(
                f"it refers to {argument or operation.name!r:.80}, which a checkpoint does not need; "
                "nothing was executed"
            )


def entries_in(file: Path, value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield a value and all that is in it, if it is a dictionary or a list, by dotted names.

    Raises:
        ValueError: it is too deep, or a key is none; the message names the file and the entry.
    """
    yield where, value
    if not isinstance(value, dict | list | tuple):
        return
    if depth > _DEEPEST:
        raise ValueError(f"{file}: entry {where!r:.80} is nested more than {_DEEPEST} levels deep")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if type(key) not in (str, int) or (type(key) is int and abs(key) >= _LARGEST):
            raise ValueError(f"{file}: entry {where!r:.80} has a key that is neither a name nor a number")
        yield from entries_in(file, inner, f"{where}.{key!s:.100}".lstrip("."), depth + 1)


def _check_value(file: Path, name: str, value: Any) -> None:
    if isinstance(value, dict | list | tuple):
        return
    if isinstance(value, Tensor):
        # An expanded tensor, or one without memory, is larger in every computation than it is in the file.
        plain = type(value) is Tensor and value.layout == torch.strided and value.device.type != "meta"
        if not plain or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise ValueError(f"{file}: entry {name!r:.200} is a tensor with fewer values than its shape says")
    elif type(value) is int:
        if abs(value) >= _LARGEST:
            raise ValueError(f"{file}: entry {name!r:.200} is a number of more than 64 bits")
    elif value is not None and type(value) not in (str, float, bool):
        raise ValueError(
            f"{file}: entry {name!r:.200} is a {type(value).__name__}, no tensor, number or text"
        )


def is_finite(value: Any) -> bool:
    """Return whether there is no NaN and no infinity in a value of a state."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)
