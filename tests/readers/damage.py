"""Systematic and random ways to damage a file, each with a name by which it can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator

Damaged = tuple[str, bytes]


def cuts(data: bytes) -> Iterator[Damaged]:
    """Cut at the beginning, in each part, around each boundary of eight bytes near both ends, at the end."""
    size = len(data)
    places = {0, 1, 2, 4, 7, 8, 9, 16, *(size * i // 12 for i in range(12)), *range(max(0, size - 3), size)}
    header = 8 + int.from_bytes(data[:8], "little")
    places |= {header - 1, header, header + 1}  # of safetensors
    for place in sorted(place for place in places if 0 <= place < size):
        yield f"cut {place}", data[:place]


def extended(data: bytes) -> Iterator[Damaged]:
    """Add something, or have everything twice."""
    yield "zeros behind", data + bytes(100)
    yield "twice", data * 2
    yield "zeros before", bytes(8) + data
    yield "all zeros", bytes(len(data))
    yield "all ones", b"\xff" * len(data)


def by_chance(data: bytes, count: int, seed: int) -> Iterator[Damaged]:
    """Flip a bit, overwrite a few bytes, take some out, or put some in; often near an end of the file."""
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        kind = chance.choice(("flip", "flip", "set", "out", "in", "swap"))
        place = _place(len(data), chance)
        yield f"{kind} at {place}, number {number} of seed {seed}", _changed(data, kind, place, chance)


def _place(size: int, chance: random.Random) -> int:
    near = min(size, 600)
    return chance.choice((chance.randrange(size), chance.randrange(near), size - 1 - chance.randrange(near)))


def _changed(data: bytes, kind: str, place: int, chance: random.Random) -> bytes:
    length = chance.choice((1, 2, 4, 8, 30))
    before, middle, after = data[:place], data[place : place + length], data[place + length :]
    if kind == "flip":
        return before + bytes([middle[0] ^ 1 << chance.randrange(8)]) + middle[1:] + after
    if kind == "set":
        value = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9", bytes([chance.randrange(256)])))
        return before + value * len(middle) + after
    if kind == "out":
        return before + after
    if kind == "in":
        return before + chance.randbytes(length) + middle + after
    other = chance.randrange(len(data))
    return before + data[other : other + length] + after
