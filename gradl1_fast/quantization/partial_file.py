"""A reader of safetensors files that reads only the requested entries, also from a truncated file.

The reader of the safetensors library refuses a truncated file. The format is simple: eight bytes give the
length of a JSON header, which gives the type, shape and offsets of each tensor that follows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _checks as check

__all__ = ["Entry", "PartialFile"]

_TYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "BOOL": torch.bool,
}  # fmt: skip
_LARGEST_HEADER = 2**24  # the header of a thousand layers takes a megabyte
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Entry:
    """The expected type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return the type and shape as text."""
        return f"{str(self.dtype).removeprefix('torch.')} of shape {self.shape}"


class PartialFile:
    """A safetensors file, opened for reading. It is a context manager.

    The header is compared with the caller's expectations before data are read or tensors allocated, so a file
    cannot cause large allocations.

    Args:
        path: path of the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the header is invalid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # Unbuffered, so that only the requested bytes are read.
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by __exit__
        self._read: set[str] = set()
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._header, self._start = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._metadata = self._header.pop("__metadata__", {})

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._header

    def error(self, key: str, requirement: str, actual: object) -> ValueError:
        """Return an error that names the file and the entry."""
        return ValueError(f"{self.path}: entry {key!r}: {requirement}, the file has {actual}")

    def check_metadata(self, expected: Mapping[str, str]) -> None:
        """Check the metadata of the file."""
        for key, value in expected.items():
            actual = self._metadata.get(key) if isinstance(self._metadata, dict) else None
            if actual != value:
                raise ValueError(f"{self.path}: its {key} must be {value!r}, the file says {actual!r:.80}")

    def metadata(self, key: str) -> str:
        """Return a string from the file's metadata.

        Raises:
            ValueError: the string is missing.
        """
        value = self._metadata.get(key) if isinstance(self._metadata, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: its {key} must be a string, the file says {value!r:.80}")
        return value

    def check_that_all_are_known(self, unread: Iterable[str]) -> None:
        """Check that every entry was read or is one of ``unread``."""
        unknown = self._header.keys() - self._read - set(unread)
        if unknown:
            raise ValueError(f"{self.path}: unknown entries for this model: {check.some(unknown)}")

    def read(self, key: str, *allowed: Entry) -> Tensor:
        """Return a tensor, which must be finite and of one of the allowed types and shapes.

        Raises:
            ValueError: it is missing, has another type or shape, is truncated, or holds NaN or infinity.
        """
        entry, begin, end = self._locate(key)
        if entry not in allowed:
            raise self.error(key, f"must be {' or '.join(map(str, allowed))}", entry)
        self._read.add(key)
        data = self._bytes(begin, end - begin)
        if len(data) < end - begin:
            raise self.error(key, f"needs the bytes up to {end}", f"no more than {self._size}: it is cut off")
        # torch.frombuffer refuses an empty buffer.
        tensor = torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise self.error(key, "must be finite", "NaN or infinity")
        return tensor.reshape(entry.shape)

    def end_of(self, keys: Iterable[str]) -> int:
        """Return the number of bytes from the beginning of the file that contain the given entries."""
        return max(self._locate(key)[2] for key in keys)

    def _bytes(self, begin: int, count: int) -> bytearray:
        self._file.seek(begin)
        data = bytearray()
        while len(data) < count and (part := self._file.read(count - len(data))):
            data += part
        return data

    def _read_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._bytes(0, 8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, self._size - 8):
            raise ValueError(f"{self.path}: not a safetensors file, or truncated: a header of {length} bytes")
        try:
            header = json.loads(self._bytes(8, length).decode())
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            raise ValueError(f"{self.path}: its header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise ValueError(f"{self.path}: its header is not a JSON object")
        return header, 8 + length

    def _locate(self, key: str) -> tuple[Entry, int, int]:
        """Return the type and shape of a tensor, and its first and last offset in the file."""
        if key not in self._header:
            raise ValueError(f"{self.path}: entry {key!r} is missing")
        claim = self._header[key]
        try:
            sizes = claim["shape"][:_MOST_DIMENSIONS]
            entry = Entry(_TYPES[claim["dtype"]], tuple(_count(size) for size in sizes))
            begin, end = (_count(offset) for offset in claim["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(key, "must have dtype, shape and data_offsets", f"{claim!r:.200}") from error
        if end - begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise self.error(key, f"{entry} does not fill its place", f"bytes {begin} to {end}")
        return entry, self._start + begin, self._start + end


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a valid size")
    return value
