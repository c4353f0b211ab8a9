"""l1 norms of many tensors at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import in_layout_of, l1, widen


def l1_norm_forward(tensors: list[Tensor]) -> Tensor:
    """Return the vector of ``sum |t|``, one entry per tensor, in the widest type of their sums."""
    norms = [l1(t) for t in tensors]
    widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    return torch.stack([n.to(widest) for n in norms])


def l1_norm_backward(dy: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return ``dx_i = dy_i * sign(t_i)`` for each tensor."""
    return [in_layout_of(widen(t).sign().mul_(c), t) for c, t in zip(dy.unbind(), tensors, strict=True)]


def l1_norm_double_backward(d_dx: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """Return ``d_dy_i = sum d_dx_i * sign(t_i)``."""
    return torch.stack([(widen(v) * t.sign()).sum() for v, t in zip(d_dx, tensors, strict=True)])
