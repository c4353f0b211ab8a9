"""JSON that every reader takes: the format has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps"]


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON text, in which a number that is NaN or infinite is null.

    Args:
        value: of dictionaries, lists, tuples, text, numbers, booleans and None.
        indent: as for :func:`json.dumps`.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
