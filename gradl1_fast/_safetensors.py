"""Files of tensors in the safetensors format, read with every check before a byte is used.

The format is simple: eight bytes give the length of a JSON header, which gives type, shape and place of each
tensor behind it. Files are written by the library of that name. Its reader refuses a file whose end is
missing, but the beginning of an any-bit file is enough for a few bits, so files are read here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast import _files
from gradl1_fast._extras import install

__all__ = ["Entry", "TensorFile", "require", "save"]

_TYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_LARGEST_HEADER = 2**24  # the header of a thousand layers takes a megabyte
_MOST_DIMENSIONS = 16


def require(what: str, extra: str) -> Any:
    """Return the library's functions for torch.

    Raises:
        ImportError: safetensors is not installed; the message says what for, and which extra has it.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{what} need safetensors: {install(extra)}") from error
    return safetensors.torch


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    what: str,
    extra: str = "export",
) -> None:
    """Write tensors into a file, which is replaced whole or not at all.

    Args:
        path: of the file.
        tensors: by name, on any device; they may share memory.
        metadata: strings to be kept beside the tensors.
        what: the kind of files, for the error message.
        extra: the extra of this package that has safetensors, for the error message.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    library = require(what, extra)
    # a clone each: the format refuses tensors that share memory, as tied weights do
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    _files.write_bytes(path, library.save(copies, metadata=dict(metadata)))


@dataclass(frozen=True)
class Entry:
    """The expected type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return the type and shape as text."""
        return f"{str(self.dtype).removeprefix('torch.')} of shape {self.shape}"


class TensorFile:
    """A safetensors file, open for reading; a context manager.

    What the header claims is compared with what the caller expects before a byte is read or a tensor made,
    so that nothing in a file decides how much memory is taken. Nothing in it is executed.

    Args:
        path: of the file.
        whole: check that the tensors fill the rest of the file exactly. Without it, no more is read than the
            entries that are asked for, and the file may be cut off behind them.

    Raises:
        OSError: the file cannot be opened.
        ValueError: its header is damaged, or the file is not whole.
    """

    def __init__(self, path: str | os.PathLike[str], *, whole: bool = True) -> None:
        self.path = os.fspath(path)
        # Unbuffered, so that only the requested bytes are read.
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by __exit__
        self._read: set[str] = set()
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._header, self._start = self._read_header()
            self._metadata = self._header.pop("__metadata__", {})
            if whole:
                self._check_whole()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

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

    def check_that_all_are_known(self, unread: Iterable[str] = ()) -> None:
        """Check that every entry was read or is one of ``unread``."""
        unknown = self._header.keys() - self._read - set(unread)
        if unknown:
            raise ValueError(f"{self.path}: unknown entries for this model: {check.some(unknown)}")

    def check_like(self, expected: Mapping[str, Tensor]) -> None:
        """Check that names, types and shapes are those of some tensors, which may be on the meta device.

        Raises:
            ValueError: an entry is missing, unknown, or of another type or shape.
        """
        missing = expected.keys() - self._header.keys()
        if missing:
            raise ValueError(f"{self.path}: missing entries for this model: {check.some(missing)}")
        self.check_that_all_are_known(expected)
        for key, like in expected.items():
            self._check_kind(key, self._locate(key)[0], Entry(like.dtype, tuple(like.shape)))

    def read_like(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all tensors, which must be finite; names, types and shapes must be those of ``expected``."""
        self.check_like(expected)
        return {key: self.read(key) for key in expected}

    def read(self, key: str, *allowed: Entry, finite: bool = True) -> Tensor:
        """Return a tensor.

        Args:
            key: its name.
            allowed: types and shapes that it may have; any if none is given.
            finite: refuse NaN and infinity.

        Raises:
            ValueError: it is missing, of another type or shape, cut off, or not finite.
        """
        entry, begin, end = self._locate(key)
        self._check_kind(key, entry, *allowed)
        self._read.add(key)
        data = self._bytes(begin, end - begin)
        if len(data) < end - begin:
            raise self.error(key, f"needs the bytes up to {end}", f"no more than {self._size}: it is cut off")
        # torch.frombuffer refuses an empty buffer.
        tensor = torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)
        if finite and not tensor.isfinite().all():
            raise self.error(key, "must be finite", "NaN or infinity")
        return tensor.reshape(entry.shape).clone()  # a view would keep the flat tensor as well

    def was_read(self, key: str) -> bool:
        """Return whether a tensor was read before."""
        return key in self._read

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
            raise self._corrupt(f"its header has {length} bytes, the file {self._size}")
        try:
            header = json.loads(self._bytes(8, length).decode())
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            raise self._corrupt(f"its header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a JSON object")
        return header, 8 + length

    def _check_whole(self) -> None:
        places = sorted(self._locate(key)[1:] for key in self._header)
        ends = [self._start, *(end for _, end in places)]
        if [begin for begin, _ in places] != ends[:-1]:
            raise self._corrupt("its tensors overlap or leave gaps")
        if ends[-1] != self._size:
            raise self._corrupt(f"its tensors end after {ends[-1]} bytes, the file after {self._size}")

    def _check_kind(self, key: str, entry: Entry, *allowed: Entry) -> None:
        if allowed and entry not in allowed:
            raise self.error(key, f"must be {' or '.join(map(str, allowed))}", entry)

    def _corrupt(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: truncated or corrupt safetensors file: {reason}")

    def _locate(self, key: str) -> tuple[Entry, int, int]:
        """Return the type and shape of a tensor, and its first and last offset in the file."""
        if key not in self._header:
            raise ValueError(f"{self.path}: entry {key!r} is missing")
        claim = self._header[key]
        try:
            entry = Entry(_TYPES[claim["dtype"]], _shape(claim["shape"]))
            begin, end = (_count(offset) for offset in claim["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(key, "must have dtype, shape and data_offsets", f"{claim!r:.200}") from error
        if end - begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise self.error(key, f"{entry} does not fill its place", f"bytes {begin} to {end}")
        return entry, self._start + begin, self._start + end


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"{len(sizes)} dimensions")
    return tuple(_count(size) for size in sizes)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a valid size")
    return value
