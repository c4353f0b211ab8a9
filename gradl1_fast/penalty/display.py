"""How a penalty shows itself: its settings and its last value, and in a notebook its largest terms."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING

from gradl1_fast._shown import Grid

if TYPE_CHECKING:
    from gradl1_fast.penalty.gradl1 import GradL1

__all__ = ["largest_terms", "summary"]

MOST_TERMS = 20


def summary(penalty: GradL1) -> str:
    """Return the settings, what is penalised, and the last value; waits for the device."""
    settings = ", ".join(f"{name}={value}" for name, value in _settings(penalty))
    last = "not called yet" if penalty.value is None else f"last value {float(penalty.value):.4g}"
    layers, sites = _counted(penalty.layers, "layer"), _counted(penalty.sites, "activation")
    return f"GradL1({settings}): {layers} and {sites} of {type(penalty.model).__name__}, {last}"


def _counted(values: Sized, noun: str) -> str:
    return f"{len(values)} {noun}{'' if len(values) == 1 else 's'}"


def _settings(penalty: GradL1) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide the value; those that are at their usual value only if they matter."""
    if penalty.share is not None:
        yield "share", f"{penalty.share.share:g}"
    if penalty.share is None or penalty.share.is_fixed:
        yield "lambda_w", f"{penalty.lambda_w:.4g}"
        yield "lambda_a", f"{penalty.lambda_a:.4g}"
    yield "scale", repr(penalty.scale)
    if penalty.scale == "step":
        yield "step_bits", str(penalty.step_bits)
    if penalty.every > 1:
        yield "every", str(penalty.every)
    if penalty.method != "exact":
        yield "method", repr(penalty.method)
        yield "epsilon", f"{penalty.epsilon:g}"
    if not penalty.enabled:
        yield "enabled", "False"


def largest_terms(penalty: GradL1) -> Iterator[Grid | str]:
    """Yield the terms of the last call, the largest first, and how many are not shown."""
    terms = {name: float(term) for name, term in penalty.terms.items()}
    if not terms:
        return
    total = sum(terms.values())
    names = sorted(terms, key=lambda name: -terms[name])
    rows = [(name, f"{terms[name]:.4g}", _percent(terms[name], total)) for name in names[:MOST_TERMS]]
    yield Grid(("term", "norm" if penalty.scale == "none" else "step × norm", "share"), rows, right=(1, 2))
    if len(names) > MOST_TERMS:
        yield f"and {len(names) - MOST_TERMS} smaller terms"


def _percent(term: float, total: float) -> str:
    return f"{100 * term / total:.1f} %" if total else ""
