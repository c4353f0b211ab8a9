"""l1_norm computed by the extension, for all tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends.compiled._tensors import DTYPES, beside, dense, engine_for, span, where


def l1_norm_forward(tensors: list[Tensor]) -> Tensor:
    """Return the vector of ``sum |t|``, in the widest type of their sums."""
    return _norms([dense(t) for t in tensors], [None] * len(tensors))


def l1_norm_backward(dy: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return ``dx_i = dy_i * sign(t_i)`` for each tensor."""
    whole = [dense(t) for t in tensors]
    out = [torch.empty_like(t) for t in whole]
    wide = dy.dtype == torch.float64
    dy = dy.to(torch.float64 if wide else torch.float32).contiguous()
    engine_for(dy).l1_norm_backward(where(dy), _pieces(whole, out), wide, span(dy))
    return out


def l1_norm_double_backward(d_dx: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """Return ``d_dy_i = sum d_dx_i * sign(t_i)``."""
    whole = [dense(t) for t in tensors]
    return _norms(whole, [beside(v, t) for v, t in zip(d_dx, whole, strict=True)])


def _norms(tensors: list[Tensor], paired: Any) -> Tensor:
    wide = any(t.dtype == torch.float64 for t in tensors)
    first, engine = tensors[0], engine_for(tensors[0])
    out = torch.empty((len(tensors),), dtype=torch.float64 if wide else torch.float32, device=first.device)
    pieces = _pieces(tensors, paired)
    room = torch.empty((engine.l1_norm_scratch_bytes(pieces) // 8,), dtype=torch.float64, device=first.device)
    engine.l1_norm(where(first), pieces, wide, span(out), span(room))
    return out


def _pieces(tensors: list[Tensor], paired: Sequence[Tensor | None]) -> list[tuple[Any, ...]]:
    return [(DTYPES[t.dtype], t.numel(), span(t), span(v)) for t, v in zip(tensors, paired, strict=True)]
