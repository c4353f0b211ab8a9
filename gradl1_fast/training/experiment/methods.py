"""The methods that an experiment compares, by the names it prints, and what each one is set to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["METHODS", "Method", "settings_of"]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        objective: as for :func:`gradl1_fast.training.objectives.make`.
        text: what it does, for a reader.
        changes: settings beside those of the recipe, or in their place.
        keeps_recipe: takes the settings of the recipe's penalty, which are those of ``gradl1``.
    """

    objective: str
    text: str
    changes: dict[str, Any] = field(default_factory=dict)
    keeps_recipe: bool = False


METHODS = {
    "plain": Method("plain", "the loss alone"),
    "gradl1": Method(
        "gradl1", "gradient l1 penalty with each norm times its quantization step", keeps_recipe=True
    ),
    "gradl1-unscaled": Method(
        "gradl1",
        "gradient l1 penalty as in the paper, norms unscaled",
        {"lambda_w": 0.001, "lambda_a": 0.001, "scale": "none", "every": 2},
    ),
    "gradl1-finite-difference": Method(
        "gradl1",
        "as gradl1, by a finite difference instead of double backprop",
        {"method": "finite_difference"},
        keeps_recipe=True,
    ),
    "l2": Method("l2", "gradient l2 penalty", {"lambda_w": 0.1, "lambda_a": 0.1}),
    "sam": Method("sam", "sharpness-aware minimisation, l-infinity ball", {"epsilon": 0.002}),
    "kure": Method("kure", "kurtosis regularisation of the weights", {"coefficient": 1.0}),
    "defensive": Method("defensive", "Defensive Quantization: orthogonal weights", {"beta": 0.002}),
    "qat-8": Method("qat", "quantization-aware training at (8, 8)", {"w": 8, "a": 8}),
    "qat-6": Method("qat", "quantization-aware training at (6, 6)", {"w": 6, "a": 6}),
    "qat-4": Method("qat", "quantization-aware training at (4, 4)", {"w": 4, "a": 4}),
}


def settings_of(method: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method's objective.

    Args:
        method: a key of :data:`METHODS`.
        recipe: settings of the recipe's penalty.
    """
    chosen = METHODS[method]
    return {**recipe, **chosen.changes} if chosen.keeps_recipe else dict(chosen.changes)
