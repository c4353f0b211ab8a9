"""Reads what ptxas says about each kernel: registers and spills."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    spilled: int

    @property
    def hot(self) -> bool:
        """Whether it walks whole tensors in a type that training uses; float64 is there for tests."""
        return "_kernel<gradl1::" in self.name and "double" not in self.name


_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'"
    r"(?:(?!Compiling entry).)*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?Used (\d+) registers",
    re.DOTALL,
)


def kernels(log: str) -> list[Kernel]:
    """Return the kernels that a build log with ``-Xptxas=-v`` tells of."""
    found = _ENTRY.findall(log)
    names = subprocess.run(
        ["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        Kernel(name.partition("(gradl1::cuda::Operands")[0], arch, int(registers), int(stores) + int(loads))
        for name, (_, arch, stores, loads, registers) in zip(names, found, strict=True)
    ]
