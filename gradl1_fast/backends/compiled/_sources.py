"""Hashes the sources of the extension. setup.py runs this file on its own, without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["fingerprint"]

_KINDS = (".h", ".cpp", ".cu", ".cmake", ".txt")


def fingerprint(folder: Path) -> str:
    """Return a hash of the names and contents of the sources in ``folder`` (``csrc``)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _KINDS):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
