"""How far two sets of tensors are apart, in units of the largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# A tensor whose values cancel, such as the gradient of a bias before a batch norm, is nothing but rounding.
NOISE = 1e-4


def difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> tuple[float, str]:
    """Compare tensors in order; the name of one is its place."""
    return named_difference(*({f"number {i}": t for i, t in enumerate(items)} for items in (a, b)))


def named_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference, in units of the largest value of a tensor of ``b``, and where it is.

    It is infinite where names, shapes or types differ.
    """
    odd = [n for n in a.keys() | b.keys() if n not in a or n not in b or not _alike(a[n], b[n])]
    if odd:
        return float("inf"), min(odd)
    sizes = {name: _largest(t) if t.is_floating_point() else 1.0 for name, t in b.items()}
    least = NOISE * max(sizes.values(), default=0.0)
    apart = {name: _apart(a[name], t) / (max(sizes[name], least) or 1.0) for name, t in b.items()}
    worst = max(apart, key=apart.__getitem__, default="")
    return (apart[worst], worst) if worst else (0.0, "")


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _apart(a: Tensor, b: Tensor) -> float:
    if not b.is_floating_point():
        return float((a != b).any())
    return _largest(torch.where(a == b, 0.0, a - b))  # infinities may be equal


def _largest(t: Tensor) -> float:
    if not t.numel():
        return 0.0
    largest = float(t.detach().abs().max())
    return float("inf") if largest != largest else largest
