"""Bit widths on the command line."""

from __future__ import annotations

from gradl1_fast._checks import MAX_BITS

__all__ = ["bits_of"]


def bits_of(word: str, option: str) -> int | None:
    """Return the width that a word names, None for float.

    Raises:
        ValueError: it is neither ``float`` nor a number of bits; the message names the option.
    """
    word = word.strip()
    if word == "float":
        return None
    if not (word.isdecimal() and 1 <= int(word) <= MAX_BITS):
        raise ValueError(f"{option}: widths are float or numbers from 1 to {MAX_BITS}, got {word!r}")
    return int(word)
