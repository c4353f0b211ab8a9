"""Plain training."""

from __future__ import annotations

from gradl1_fast.training.methods.interface import Family, Method, Variant

__all__ = ["Plain"]


class Plain(Method):
    """The loss alone.

    Args:
        model: a converted model.
    """

    name = "plain"
    text = "the loss alone"
    family = Family.LOSS
    compilable = True
    variants = (Variant("plain", "the loss alone"),)
