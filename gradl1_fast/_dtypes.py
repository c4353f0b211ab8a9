"""The rule about types that all packages share."""

from __future__ import annotations

import torch

__all__ = ["sum_dtype"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of ``dtype`` are summed and scaled: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
