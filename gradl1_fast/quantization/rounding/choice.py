"""Selects a rounding method by name or as an object."""

from __future__ import annotations

from gradl1_fast.quantization.rounding.adaround import AdaRound
from gradl1_fast.quantization.rounding.base import RoundingMethod
from gradl1_fast.quantization.rounding.gptq import GPTQ

__all__ = ["NAMES", "choose"]

NAMES: dict[str, type[RoundingMethod]] = {"gptq": GPTQ, "adaround": AdaRound}


def choose(caller: str, method: str | RoundingMethod) -> RoundingMethod:
    """Return the requested method; ``caller`` is used in messages.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is neither a name nor an object of one of the classes.
    """
    if isinstance(method, str):
        if method not in NAMES:
            raise ValueError(f"{caller}: method must be one of {', '.join(map(repr, NAMES))}, got {method!r}")
        return NAMES[method]()
    if not isinstance(method, RoundingMethod):
        raise TypeError(
            f"{caller}: method must be a name or an object of gradl1_fast.rounding, got {method!r:.100}"
        )
    return method
