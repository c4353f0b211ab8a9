"""Second moments of the operands of layers' weights, which determine the error of the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.nn.foreign import Product

__all__ = ["SecondMoments", "columns"]

_LARGEST = 1 << 23  # values of columns at once


class SecondMoments:
    """``E[x x^T]`` of the columns ``x`` that multiply the rows of a weight, for each group.

    Memory does not grow with the data.

    Attributes:
        count: the number of columns.
    """

    def __init__(self) -> None:
        self.count = 0
        self._own: Tensor | None = None
        self._cross: Tensor | None = None

    def update(self, product: Product, exact: Product | None = None) -> None:
        """Add the operand of a weight, and the corresponding operand in the float model."""
        others = _parts(product if exact is None else exact)
        for x, y in zip(_parts(product), others, strict=True):
            self._own = _sum(self._own, x @ x.mT)
            if exact is not None:
                self._cross = _sum(self._cross, y @ x.mT)
            self.count += x.shape[-1]

    @classmethod
    def sum(cls, parts: Sequence[SecondMoments]) -> SecondMoments:
        """Return the combined float moments of several layers with a shared weight."""
        result = cls()
        for part in parts:
            result.count += part.count
            result._own = _sum(result._own, part.total())
        return result

    def total(self) -> Tensor:
        """Return ``sum x x^T``, shape ``(groups, columns, columns)``, float64."""
        assert self._own is not None
        return self._own

    def mean(self) -> Tensor:
        """Return ``E[x x^T]``, in the shape of :meth:`total`."""
        return self.total() / self.count

    def cross(self) -> Tensor | None:
        """Return ``E[y x^T]`` with the column ``y`` of the float model; None if there was none."""
        return None if self._cross is None else self._cross / self.count


def columns(product: Product) -> Tensor:
    """Return the columns of a product, ``(groups, columns, n)``, float32 or float64.

    A column of a convolution is the patch under the kernel at one position, in the order of the weight:
    channels of the group, then kernel positions.
    """
    x, kernel = product.x, product.kernel
    x = x if x.dtype == torch.float64 else x.float()
    if not kernel:
        return x.reshape(-1, x.shape[-1]).t()[None]
    n, groups = len(kernel), product.options.get("groups", 1)
    x = x if x.dim() == n + 2 else x[None]
    stride, dilation = (_tuple(product.options.get(name, 1), n) for name in ("stride", "dilation"))
    x = torch.nn.functional.pad(x, _padding(product.options.get("padding", 0), kernel, dilation))
    if torch.Size(kernel).numel() > 1:
        x = x.contiguous()  # patches are copied in this order, several times faster from it
    for i in range(n):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    x = x.unflatten(1, (groups, -1))  # (N, groups, C / groups, *out, *kernel)
    x = x.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    return x.flatten(1, n + 1).flatten(2)


def _parts(product: Product) -> Iterator[Tensor]:
    """Yield the columns in parts of limited size."""
    x, n = product.x, len(product.kernel)
    if not n:
        rows = x.reshape(-1, x.shape[-1])
        sizes, values = max(1, _LARGEST // max(1, x.shape[-1])), rows
    else:
        values = x if x.dim() == n + 2 else x[None]
        sizes = max(1, _LARGEST // max(1, values[:1].numel() * torch.Size(product.kernel).numel()))
    for part in values.split(sizes):
        if part.numel():
            yield columns(Product(part, product.kernel, product.options))


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if total is None else total + part.double()


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return the padding in the format of ``torch.nn.functional.pad``, last dimension first."""
    n = len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _tuple(0 if padding == "valid" else padding, n)]
    return [side for pair in reversed(sides) for side in pair]


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * n if len(sizes) == 1 else sizes
