"""Operations prepared for a shape: the base class, the tap and fake quantization.

Sizes, constants and numbers of programs are settled when an object is made. A call allocates its results and
launches; it looks at the layout of gradients, which come from outside, and copies where it is not that of
preparation.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.triton import _launch, fake_quantize, tap
from gradl1_fast.backends.triton._ends import PARTIALS, ends_finisher
from gradl1_fast.backends.triton._launch import Kind, Launch, kind_of

__all__ = ["FakeQuantize", "Prepared", "Tap", "prepare_fake_quantize", "prepare_tap"]


class Prepared:
    """The layout and the types of all calls."""

    def __init__(self, x: Tensor) -> None:
        self._strides, self._dtype, self._sums = x.stride(), x.dtype, sum_dtype(x.dtype)
        self._scalar = torch.empty((), dtype=self._sums, device=x.device)  # what results are made like
        self._ends = torch.empty((4,), dtype=self._sums, device=x.device)

    def _in_layout(self, t: Tensor | None, x: Tensor) -> Tensor | None:
        """Return ``t`` in the layout of ``x``, which is fixed by preparation."""
        if t is None or (t.stride() == self._strides and not t.is_neg()):
            return t
        return _launch.in_layout_of(t, x)


class _Elementwise(Prepared):
    """Operations whose programs each take a block of memory."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._blocks, self._numel = _launch.blocks(x.numel()), x.numel()
        self._constants = {"ACC": _launch.acc(x.dtype), "BLOCK": _launch.BLOCK, **_launch.OPTIONS}

    def _launch(self, kernel: object, **arguments: object) -> Launch:
        return Launch(kernel, self._blocks, n=self._numel, **arguments, **self._constants)

    @cached_property
    def _finish(self) -> Launch:
        return _launch.finisher(self._sums, self._blocks, 1)

    def _partials(self) -> Tensor:
        return self._scalar.new_empty((1, self._blocks, 1))

    def _total(self, kind: Kind, partials: Tensor) -> Tensor:
        total = torch.empty_like(self._scalar)
        self._finish(kind, partials, (total,))
        return total

    def _is_as_prepared(self, t: Tensor) -> bool:
        return t.dtype is self._dtype and t.stride() == self._strides and not t.is_neg()


class Tap(_Elementwise):
    """The identity, which measures the norm of its gradient and the ends of its input, for dense tensors."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._sum = self._launch(tap._tap_backward_kernel)
        self._sign = self._launch(tap._tap_double_backward_kernel)
        self._look = self._launch(tap._tap_ends_kernel)
        self._add = self._launch(tap._tap_add_ends_gradient_kernel)

    @cached_property
    def _finish_ends(self) -> Launch:
        return ends_finisher(self._blocks)

    def backward(self, dy: Tensor) -> Tensor:
        """Return ``l1 = sum |dy|``."""
        if not self._is_as_prepared(dy):
            return tap.tap_backward(dy)
        with _launch.on_device_of(dy):
            kind, partials = kind_of(dy), self._partials()
            self._sum(kind, dy, partials)
            return self._total(kind, partials)

    def double_backward(self, d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
        """Return ``d_dy = d_dx + d_l1 * sign(dy)``."""
        if d_l1 is None or not self._is_as_prepared(dy):
            return tap.tap_double_backward(d_dx, d_l1, dy)
        with _launch.on_device_of(dy):
            v, d_dy = self._in_layout(d_dx, dy), torch.empty_like(dy)
            self._sign(kind_of(v, d_l1, dy), v, d_l1, dy, d_dy)
            return d_dy

    def ends(self, x: Tensor) -> Tensor:
        """Return the smallest and the largest value of ``x`` and how many values are equal to each."""
        with _launch.on_device_of(x):
            x, partials = x.resolve_neg(), self._scalar.new_empty((PARTIALS, self._blocks))
            kind, ends = kind_of(x), torch.empty_like(self._ends)
            self._look(kind, x, partials)
            self._finish_ends(kind, partials, ends)
            return ends

    def add_ends_gradient(self, dy: Tensor | None, x: Tensor, ends: Tensor, d_ends: Tensor) -> Tensor:
        """Return ``dy`` plus the gradient that ``d_ends`` gives ``x``."""
        with _launch.on_device_of(x):
            x, d_ends, out = x.resolve_neg(), d_ends.contiguous(), torch.empty_like(x)
            dy = self._in_layout(dy, out)
            self._add(kind_of(dy, x, ends, d_ends), dy, x, ends, d_ends, out)
            return out


class FakeQuantize(_Elementwise):
    """Fake quantization with one scale and zero point for the tensor, for dense tensors."""

    def __init__(self, x: Tensor, codes: tuple[int, int]) -> None:
        super().__init__(x)
        self._sizes = {
            "q_min": codes[0], "q_max": codes[1], "inner": 1, "channels": 1, "period": 1,
            "PER_CHANNEL": False, "INDEX": tl.int32,
        }  # fmt: skip
        self._round = self._launch(fake_quantize._fake_quantize_forward_kernel, **self._sizes)
        self._mask = self._launch(fake_quantize._fake_quantize_backward_kernel, **self._sizes)
        self._mask_and_sum = self._launch(fake_quantize._fake_quantize_backward_kernel, **self._sizes)
        self._add = self._launch(fake_quantize._fake_quantize_double_backward_kernel, **self._sizes)

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``x`` quantized and dequantized."""
        with _launch.on_device_of(x):
            x = x.resolve_neg()
            y = torch.empty_like(x)
            self._round(kind_of(x, scale, zero_point), x, scale, zero_point, y)
            return y

    def backward(
        self, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, with_l1: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``dx, l1``."""
        with _launch.on_device_of(x):
            x, dy = x.resolve_neg(), self._in_layout(dy, x)  # type: ignore[assignment]
            dx, kind = torch.empty_like(x), kind_of(dy, x, scale, zero_point)
            if not with_l1:
                self._mask(kind, dy, x, scale, zero_point, dx, None)
                return dx, None
            partials = self._partials()
            self._mask_and_sum(kind, dy, x, scale, zero_point, dx, partials)
            return dx, self._total(kind, partials)

    def double_backward(
        self,
        d_dx: Tensor | None,
        d_l1: Tensor | None,
        dy: Tensor,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
    ) -> Tensor:
        """Return ``d_dy``."""
        if d_dx is None:
            return tap.tap_double_backward(None, d_l1, dy)
        with _launch.on_device_of(x):
            x, d_dy = x.resolve_neg(), torch.empty_like(x)
            d_dx, dy = self._in_layout(d_dx, x), self._in_layout(dy, x)  # type: ignore[assignment]
            kind = kind_of(d_dx, d_l1, dy, x, scale, zero_point)
            self._add(kind, d_dx, d_l1, dy, x, scale, zero_point, d_dy)
            return d_dy


def prepare_tap(x: Tensor) -> Tap | None:
    """Prepare the tap of tensors like ``x``; None if their memory has gaps."""
    return Tap(x) if _is_dense(x) else None


def prepare_fake_quantize(x: Tensor, codes: tuple[int, int]) -> FakeQuantize | None:
    """Prepare fake quantization of tensors like ``x``; None if their memory has gaps."""
    return FakeQuantize(x, codes) if _is_dense(x) else None


def _is_dense(x: Tensor) -> bool:
    return _launch.dense(x) is x and torch.empty_like(x).stride() == x.stride()
