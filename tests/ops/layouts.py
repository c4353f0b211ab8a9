"""The same values in other memory layouts; gaps between the values hold NaN."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t.contiguous()


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t.contiguous()


def sliced(t: Tensor) -> Tensor:
    whole = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
    part = whole[tuple(slice(1, None, 2) for _ in t.shape)]
    return part.copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1].clone().expand(t.shape) if t.dim() else t


def constant(t: Tensor) -> Tensor:
    return t.flatten()[0].clone().expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (channels_last, transposed, sliced, expanded, constant)
}
