"""Settings as TOML: dataclasses of dataclasses, read by msgspec and written so that they read back."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

from gradl1_fast._extras import install

__all__ = ["SettingsError", "dumps", "from_dict", "parse_value", "read", "to_dict"]

T = TypeVar("T")
Scalar = str | int | float | bool


class SettingsError(ValueError):
    """A setting is unknown, has the wrong type or a value that is not allowed; the message names it."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        SettingsError: the file is not TOML; the message names the file and the line.
        OSError: it cannot be read.
        ImportError: msgspec is not installed, or Python is 3.10 and tomli is not.
    """
    library = _msgspec()
    try:
        return library.toml.decode(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # a wrong encoding, a wrong syntax; nested without end
        raise SettingsError(f"{path}: not a TOML file: {error!s:.300}") from error


def parse_value(text: str) -> Scalar:
    """Return the number or truth value that a text is in TOML; any other text is itself."""
    library = _msgspec()
    try:
        value = library.toml.decode(f"value = {text}")["value"]
    except ValueError:
        return text
    return value if isinstance(value, Scalar) else text


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Return a dataclass from the values of its fields; those that are left out have their defaults.

    Args:
        kind: a dataclass; its fields are of any types that msgspec knows, dataclasses included.
        values: as TOML has them; dataclasses and dictionaries are tables.
        where: the place of the values, for the message.

    Raises:
        SettingsError: names the place, the key and what is allowed.
        ImportError: msgspec is not installed.
    """
    library = _msgspec()
    _check_keys(kind, values, where)
    try:
        return library.convert(values, kind)
    except library.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$.")
        raise SettingsError(": ".join(filter(None, (where, key.rstrip("`"), reason)))) from error


def _check_keys(kind: type, values: dict[str, Any], where: str) -> None:
    """Raise for a key that is not a field: msgspec ignores those of dataclasses."""
    hints = typing.get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise SettingsError(f"{where}: unknown key {min(unknown)!r:.80}; allowed are {', '.join(hints)}")
    for key, inner in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(inner, dict):
            _check_keys(typing.cast(type, hints[key]), inner, f"{where}: {key}")


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as tables and values, without those that are None."""
    return dataclasses.asdict(settings, dict_factory=_without_none)


def _without_none(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None}


def dumps(settings: Any) -> str:
    """Return a dataclass as TOML that :func:`read` and :func:`from_dict` turn into an equal one.

    Raises:
        ImportError: msgspec or tomli_w is not installed.
    """
    library = _msgspec()
    return library.toml.encode(to_dict(settings)).decode()


def _msgspec() -> Any:
    try:
        import msgspec.toml
        import tomli_w  # noqa: F401  # msgspec writes TOML with it
    except ImportError as error:
        raise ImportError(
            f"settings are read and written by msgspec and tomli_w: {install('train')}"
        ) from error
    return msgspec
