"""What operators and backends agree on about the mask of a gradient."""

from __future__ import annotations

from torch import Tensor


def is_masked(activation: str, scale: Tensor | None) -> bool:
    """Return whether anything behind a batch norm stops a gradient: an activation, or a quantizer's ends."""
    return activation != "none" or scale is not None
