"""l1_norm computed by the extension, for all tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradl1_fast.backends.compiled._tensors import DTYPES, Settings, beside, dense, engine_for, run, span


def l1_norm_forward(tensors: list[Tensor]) -> Tensor:
    """Return the vector of ``sum |t|``, in the widest type of their sums."""
    return _norms([dense(t) for t in tensors], [None] * len(tensors))


def l1_norm_backward(dy: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return ``dx_i = dy_i * sign(t_i)`` for each tensor."""
    whole = [dense(t) for t in tensors]
    out = [torch.empty_like(t) for t in whole]
    wide = dy.dtype == torch.float64
    dy = dy.to(torch.float64 if wide else torch.float32).contiguous()
    run("l1_norm_backward", dy, _settings(whole, out, wide), dy=dy)
    return out


def l1_norm_double_backward(d_dx: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """Return ``d_dy_i = sum d_dx_i * sign(t_i)``."""
    whole = [dense(t) for t in tensors]
    return _norms(whole, [beside(v, t) for v, t in zip(d_dx, whole, strict=True)])


def _norms(tensors: list[Tensor], paired: Sequence[Tensor | None]) -> Tensor:
    wide, first = any(t.dtype == torch.float64 for t in tensors), tensors[0]
    norms = torch.empty((len(tensors),), dtype=torch.float64 if wide else torch.float32, device=first.device)
    settings = _settings(tensors, paired, wide)
    run("l1_norm", first, settings, norms=norms, scratch=_scratch(first, settings))
    return norms


def _settings(tensors: list[Tensor], paired: Sequence[Tensor | None], wide: bool) -> Settings:
    pieces = [(DTYPES[t.dtype], t.numel(), span(t), span(v)) for t, v in zip(tensors, paired, strict=True)]
    return {"pieces": pieces, "wide": wide}


def _scratch(like: Tensor, settings: Settings) -> Tensor | None:
    """Return memory for the partial sums of all tensors; None on the host, which has its own."""
    engine = engine_for(like)
    if engine.in_host_memory:
        return None
    count = engine.l1_norm_scratch_bytes(settings) // 8
    return torch.empty((count,), dtype=torch.float64, device=like.device)
