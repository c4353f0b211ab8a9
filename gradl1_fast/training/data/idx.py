"""The IDX format of the MNIST family: a magic number, the sizes, then the values, all compressed by gzip.

Source: http://yann.lecun.com/exdb/mnist, "the IDX file format": two zero bytes, the type of the values
(8 for unsigned bytes), the number of dimensions, each size as a big-endian 32-bit number, the values.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradl1_fast.training.data.dataset import DataError

__all__ = ["IdxFile"]

_UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class IdxFile:
    """What a file must hold.

    Attributes:
        name: of the file.
        shape: of its values.
        sha256: of its content before compression, in hexadecimal.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    def read(self, folder: Path) -> Tensor:
        """Return the values, a tensor of uint8.

        Raises:
            DataError: the file is not an IDX file, is damaged, or has other contents than expected.
            OSError: it cannot be read.
        """
        path = folder / self.name
        header = 4 + 4 * len(self.shape)
        content = _decompress(path, header + math.prod(self.shape) + 1)
        self._check_header(path, bytes(content[:header]))
        if len(content) != header + math.prod(self.shape):
            what = "more" if len(content) > header + math.prod(self.shape) else "fewer"
            raise DataError(
                f"{path}: holds {what} bytes than its shape {self.shape} needs; download it again"
            )
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"{path}: wrong checksum: the file is damaged or altered; download it again")
        return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(self.shape)

    def _check_header(self, path: Path, header: bytes) -> None:
        if len(header) < 4 or header[:2] != b"\0\0":
            raise DataError(f"{path}: not an IDX file: it does not begin with two zero bytes")
        if header[2] != _UNSIGNED_BYTES or header[3] != len(self.shape):
            raise DataError(
                f"{path}: must hold unsigned bytes (type 8) in {len(self.shape)} dimensions, "
                f"says type {header[2]} in {header[3]}"
            )
        sizes = struct.unpack(f">{len(self.shape)}I", header[4:].ljust(4 * len(self.shape), b"\0"))
        if sizes != self.shape:
            raise DataError(f"{path}: the shape must be {self.shape}, the file says {sizes}")


def _decompress(path: Path, limit: int) -> bytearray:
    """Return at most ``limit`` bytes, whatever the file would unpack to."""
    try:
        with gzip.open(path) as file:
            return bytearray(file.read(limit))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or corrupt gzip file ({error}); download it again") from error
