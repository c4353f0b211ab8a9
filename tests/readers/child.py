"""Reads damaged files in separate processes with limited memory; a script for test_readers.

For each damage a line of JSON: the reader, the damage, whether it is one that was made to do harm, the error
(empty where the file was read), by how many bytes the file is shorter than the whole one, by how many the
process grew at the most, and whether anything was executed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.readers import damage, hostile
from tests.readers.table import READERS, Reader, templates

SPARE = 160 * 2**20  # bytes that a reader may ask for; hostile files ask for more
STATUS = Path("/proc/self/status")


def status(name: str) -> int:
    """Return a size that the kernel knows of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def attempt(reader: Reader, folder: Path) -> str:
    """Return the error with which a reader refuses what is in a folder, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a damaged file makes other libraries say
            reader.read(folder)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        text = str(error).replace(str(folder / reader.file), "FILE").replace(str(folder), "FOLDER")
        return f"{'/'.join(kinds[: kinds.index('Exception')])}: {text}"
    return ""


def damages(
    reader: Reader, data: bytes, sentinel: Path, count: int, seed: int
) -> Iterator[tuple[bool, str, bytes]]:
    """Yield all that is done to a reader's file, and whether it is hostile."""
    yield False, "whole", data
    for name, content in (*damage.cuts(data), *damage.extended(data)):
        yield False, name, content
    for name, content in hostile.contents(reader.kind, data, sentinel):
        yield True, name, content
    for name, content in damage.by_chance(data, count, seed):
        yield False, name, content


def limit_memory() -> None:
    """Let any larger allocation fail."""
    size = status("VmSize") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def spring(folder: Path, sentinel: Path) -> None:
    """Put a program first on the path by the name of the one that draws PostScript; it leaves a trace."""
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\nmkdir -p {sentinel}\n")
        (folder / name).chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def try_all(reader: Reader, place: Path, count: int, seed: int) -> None:
    """Damage the file of one reader in every way."""
    folder, sentinel = place / "files", place / "executed"
    folder.mkdir()
    spring(place / "programs", sentinel)
    reader.write(folder)
    path = folder / reader.file
    data = path.read_bytes()
    attempt(reader, folder)  # imports what it needs
    everything = list(damages(reader, data, sentinel, count, seed))
    limit_memory()
    for harm, name, content in everything:
        path.write_bytes(content)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        error = attempt(reader, folder)
        row = {"reader": reader.name, "damage": name, "hostile": harm, "error": error}
        grown, missing = status("VmHWM") - before, len(data) - len(content)
        more = {"missing": missing, "grown": grown, "executed": sentinel.exists()}
        print(json.dumps({**row, **more}), flush=True)


def main() -> None:
    """Fork for each reader: what is imported and made once, all have."""
    torch.set_num_threads(1)
    count, seed, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for make in (templates, hostile.zip_bomb, hostile.gzip_bomb, hostile.deflated):
        make()
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            process = os.fork()
            if not process:
                try:
                    try_all(READERS[name], Path(place), count, seed)
                    os._exit(0)
                finally:
                    os._exit(1)
            if os.waitpid(process, 0)[1]:
                sys.exit(f"the process that reads a {name} has died")


if __name__ == "__main__":
    main()
