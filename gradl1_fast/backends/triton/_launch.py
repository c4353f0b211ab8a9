"""What the launch wrappers share: layouts, types, sizes of blocks, launches, and the finish of a sum.

A kernel walks over memory, not over indices: any dense tensor, whatever the order of its dimensions,
is a line of numbers. A tensor with gaps or overlaps (sliced, expanded), and one whose layout differs
from that of the result, is first copied into the layout of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.triton._device import finish_kernel, stacked_finish_kernel

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
ALIGNMENT = 16  # bytes, of memory that Triton reads in words of that size

Kind = tuple[torch.dtype | None, ...] | None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of ``x`` current, so that kernels go to its current stream."""
    return torch.cuda.device_of(x)


def blocks(n: int) -> int:
    """Return the number of blocks that cover ``n`` elements."""
    return triton.cdiv(n, BLOCK)


def acc(dtype: torch.dtype) -> Any:
    """Return Triton's type of the sums of values of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(x: Tensor) -> Tensor:
    """Return ``x``, or a copy without gaps and overlaps where it has some."""
    if x.is_neg():
        x = x.resolve_neg()  # its memory holds the opposite of its values
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return torch.empty_like(x).copy_(x)
        expected *= size
    return x


@overload
def in_layout_of(x: Tensor, like: Tensor) -> Tensor: ...
@overload
def in_layout_of(x: Tensor | None, like: Tensor) -> Tensor | None: ...
def in_layout_of(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``x``, or a copy with the strides of the dense tensor ``like`` where they differ."""
    if x is not None and x.is_neg():
        x = x.resolve_neg()  # its memory holds the opposite of its values
    if (
        x is None
        or x.stride() == like.stride()
        or all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), like.stride(), strict=True))
    ):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def partials(x: Tensor, *shape: int) -> Tensor:
    """Return a tensor for partial sums of values like those of ``x``."""
    return torch.empty(shape, dtype=sum_dtype(x.dtype), device=x.device)


def kind_of(*given: Tensor | None) -> Kind:
    """Return what a compiled kernel depends on in these tensors: their types, and which are absent.

    None if one is not aligned: such tensors are rare, and Triton compiles other kernels for them.
    """
    places = 0
    types: list[torch.dtype | None] = []
    for t in given:
        if t is None:
            types.append(None)
        else:
            places |= t.data_ptr()
            types.append(t.dtype)
    return None if places % ALIGNMENT else tuple(types)


class Launch:
    """A kernel on a grid, with the arguments that are the same in every call.

    To find the compiled kernel, Triton looks at every argument in each call. Here all but the tensors are
    settled, so their kind tells which kernel it is: Triton finds the kernel of the first call of a kind, and
    the other calls launch that one.

    Args:
        kernel: whose parameters are what a call gives, followed by ``arguments``.
        grid: number of programs.
        arguments: sizes, constants and options by name.
    """

    def __init__(self, kernel: Any, grid: int, **arguments: Any) -> None:
        self._kernel, self._grid, self._arguments = kernel, (grid, 1, 1), arguments
        self._found: dict[Kind, tuple[Callable[..., Any], list[Any]]] = {}

    def __call__(self, kind: Kind, *given: Any) -> None:
        """Launch the kernel.

        Args:
            kind: of the tensors from outside, by :func:`kind_of`; it also tells which others are absent.
            given: the first arguments. Tensors that no kind describes are newly allocated, hence aligned.
        """
        found = self._found.get(kind)
        if found is None:
            self._find(kind, given)
        else:
            launch, rest = found
            launch(*given, *rest)

    def _find(self, kind: Kind, given: tuple[Any, ...]) -> None:
        """Launch the kernel that Triton finds, and keep it for the kind; its interpreter has none."""
        compiled = self._kernel[self._grid](*given, **self._arguments)
        if compiled is not None and kind is not None:
            names = self._kernel.arg_names[len(given) :]
            self._found[kind] = compiled[self._grid], [self._arguments[name] for name in names]


def finisher(dtype: torch.dtype, rows: int, columns: int, stacked: int = 0) -> Launch:
    """Return the launch that sums values of ``(k, rows, columns)`` over the rows.

    Its results go into ``k`` tensors, or with ``stacked=k`` into one of ``(k, columns)``.
    """
    width = min(triton.next_power_of_2(columns), 32)
    sizes = {"rows": rows, "columns": columns, "ROWS": 1024 // width, "COLS": width}
    kernel = stacked_finish_kernel if stacked else finish_kernel
    count = {"COUNT": stacked} if stacked else {}
    return Launch(kernel, triton.cdiv(columns, width), **sizes, **count, ACC=acc(dtype), **OPTIONS)


def finish(values: Tensor, outs: tuple[Tensor, ...]) -> None:
    """Sum ``values`` of ``(len(outs), rows, columns)`` over the rows, each k into ``outs[k]``."""
    finisher(values.dtype, *values.shape[1:])(None, values, outs)


def total(values: Tensor) -> Tensor:
    """Return the sum of all ``values`` as a scalar."""
    out = partials(values)
    finish(values.view(1, -1, 1), (out,))
    return out
