"""Settings as TOML: dataclasses of dataclasses, read with every check and written so that they read back."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from gradl1_fast._extras import install

__all__ = ["SettingsError", "dumps", "from_dict", "parse_value", "read", "to_dict"]

T = TypeVar("T")
Scalar = str | int | float | bool

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


class SettingsError(ValueError):
    """A setting is unknown, has the wrong type or a value that is not allowed; the message names it."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        SettingsError: the file is not TOML; the message names the file and the line.
        OSError: it cannot be read.
        ImportError: Python is 3.10 and tomli is not installed.
    """
    try:
        return _parser().loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a wrong encoding, a wrong syntax; nested without end
        raise SettingsError(f"{path}: not a TOML file: {error!s:.300}") from error


def _parser() -> Any:
    try:
        return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ImportError(f"Python 3.10 reads TOML with tomli: {install('train')}") from error


def parse_value(text: str) -> Scalar:
    """Return the number or truth value that a text is in TOML; any other text is itself."""
    try:
        value = _parser().loads(f"value = {text}")["value"]
    except ValueError:
        return text
    return value if type(value) in _WORDS else text


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Return a dataclass from the values of its fields; those that are left out have their defaults.

    Args:
        kind: a dataclass; its fields are numbers, strings, truth values, None or one of these,
            dictionaries of them, or dataclasses in turn.
        values: as TOML has them; dataclasses and dictionaries are tables.
        where: where the values stand, for the message.

    Raises:
        SettingsError: names the place, the key and what is allowed.
    """
    hints = typing.get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise SettingsError(f"{where}: unknown key {min(unknown)!r:.80}; allowed are {', '.join(hints)}")
    found = {key: _field(hints[key], value, where, key) for key, value in values.items()}
    try:
        return kind(**found)
    except (ValueError, TypeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{where}: {error}") from error


def _field(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise SettingsError(f"{where}: {key} must be a table [{key}], got {_shown(value)}")
        return from_dict(hint, value, f"{where} [{key}]")  # type: ignore[arg-type]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(type(v) in _WORDS for v in value.values()):
            raise SettingsError(f"{where}: {key} must be a table of numbers, strings, true or false")
        return value
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        words = " or ".join(_WORDS[one] for one in allowed if one in _WORDS)
        raise SettingsError(f"{where}: {key} must be {words}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Return a value for a message; tables and lists may be of any size and depth."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return f"{value!r:.80}"


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as tables and values, without those that are None."""
    return {key: value for key, value in _plain(settings).items() if value is not None}


def _plain(settings: Any) -> dict[str, Any]:
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {key: to_dict(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}


def dumps(settings: Any) -> str:
    """Return a dataclass as TOML that :func:`read` and :func:`from_dict` turn into an equal one."""
    return _table("", to_dict(settings)).lstrip("\n")


def _table(name: str, values: dict[str, Any]) -> str:
    """Return a table and those inside it, values first, as TOML wants it."""
    lines = [
        f"{_key(key)} = {_value(value)}\n" for key, value in values.items() if not isinstance(value, dict)
    ]
    head = f"\n[{name}]\n" if name and (lines or not values) else ""
    inner = {f"{name}.{_key(key)}".lstrip("."): v for key, v in values.items() if isinstance(v, dict)}
    return head + "".join(lines) + "".join(_table(key, value) for key, value in inner.items())


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _value(key)


def _value(value: Scalar) -> str:
    if isinstance(value, str):
        # JSON's escapes are a part of TOML's; only the character DEL stands bare in JSON, and must not here
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)  # of floats the shortest text that reads back the same; inf and nan are TOML's too
