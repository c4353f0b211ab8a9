"""The tap and fake quantization prepared by the extension, and the base class of prepared operations.

The extension checks type, sizes and options when an object is made. A call allocates its results and passes
the address of each field by name, 0 where there is nothing; names in the order of ``csrc/passes.h`` are found
at once. It looks at the layout of gradients and at the type of vectors, since both come from outside, and
copies where they differ from what was prepared.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends import contract
from gradl1_fast.backends.compiled import tap
from gradl1_fast.backends.compiled._tensors import (
    DTYPES,
    Settings,
    beside,
    dense,
    engine_for,
    new_vector,
    settings_of,
    where,
)

__all__ = [
    "FakeQuantize",
    "Prepared",
    "Tap",
    "Taps",
    "prepare_fake_quantize",
    "prepare_tap",
    "prepare_taps",
]


class Prepared:
    """Base class: the layout and the types of all calls."""

    def __init__(self, x: Tensor, settings: Settings) -> None:
        self._strides, self._dtype, self._sums = x.stride(), x.dtype, sum_dtype(x.dtype)
        self._scalar, self._four = new_vector(x), new_vector(x, 4)  # what results are made like
        self._engine, self._settings = engine_for(x), settings
        # The CPU loops have scratch memory of their own.
        on_host = self._engine.in_host_memory
        self._scratch_size = 0 if on_host else self._engine.scratch_bytes(settings["layout"]) // 8

    def _prepare(self, name: str) -> Callable[..., None]:
        """Return a pass of the extension with the settings of all calls."""
        prepared: Callable[..., None] = getattr(self._engine, f"prepare_{name}")(self._settings)
        return prepared

    def _tensor(self, t: Tensor, x: Tensor) -> Tensor:
        """Return ``t`` in the type and layout of ``x``, which are fixed by preparation."""
        if t.dtype is self._dtype and t.stride() == self._strides and not t.is_neg():
            return t
        return torch.empty_like(x).copy_(t)

    def _vector(self, t: Tensor | None, kept: list[Tensor]) -> int:
        """Return the address of ``t``, a scalar or one value per channel, in the type of sums.

        A copy is appended to ``kept``, which must live as long as the address is used.
        """
        if t is None:
            return 0
        if t.dtype is not self._sums or not t.is_contiguous() or t.is_neg():
            t = t.to(self._sums).resolve_neg().contiguous()
            kept.append(t)
        return t.data_ptr()

    def _scratch(self, x: Tensor, kept: list[Tensor]) -> int:
        """Return the address of scratch memory, which is appended to ``kept``; 0 on the host."""
        if not self._scratch_size:
            return 0
        kept.append(torch.empty((self._scratch_size,), dtype=torch.float64, device=x.device))
        return kept[-1].data_ptr()


class Tap(Prepared):
    """The identity, which measures the norm of its gradient and the ends of its input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x, settings_of(x, None))
        self._ends, self._backward = self._prepare("tap_ends"), self._prepare("tap_backward")
        self._double_backward = self._prepare("tap_double_backward")
        self._add_ends_gradient = self._prepare("tap_add_ends_gradient")

    def ends(self, x: Tensor) -> Tensor:
        """Return the smallest and the largest value of ``x`` and how many values are equal to each."""
        x, ends = x.resolve_neg() if x.is_neg() else x, torch.empty_like(self._four)
        kept: list[Tensor] = []
        self._ends(where(x), x=x.data_ptr(), ends=ends.data_ptr(), scratch=self._scratch(x, kept))
        return ends

    def backward(self, dy: Tensor) -> Tensor:
        """Return ``l1 = sum |dy|``."""
        if dy.stride() != self._strides or dy.dtype is not self._dtype:
            return tap.tap_backward(dy)
        l1 = torch.empty_like(self._scalar)
        kept: list[Tensor] = []
        self._backward(where(dy), dy=dy.data_ptr(), l1=l1.data_ptr(), scratch=self._scratch(dy, kept))
        return l1

    def double_backward(self, d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
        """Return ``d_dy = d_dx + d_l1 * sign(dy)``."""
        if d_l1 is None or dy.stride() != self._strides or dy.dtype is not self._dtype or dy.is_neg():
            return tap.tap_double_backward(d_dx, d_l1, dy)
        v, d_dy = None if d_dx is None else self._tensor(d_dx, dy), torch.empty_like(dy)
        kept: list[Tensor] = []
        self._double_backward(
            where(dy),
            d_dx=0 if v is None else v.data_ptr(),
            d_l1=self._vector(d_l1, kept),
            dy=dy.data_ptr(),
            d_dy=d_dy.data_ptr(),
        )
        return d_dy

    def add_ends_gradient(self, dy: Tensor | None, x: Tensor, ends: Tensor, d_ends: Tensor) -> Tensor:
        """Return ``dy`` plus the gradient that ``d_ends`` gives ``x``."""
        x = x.resolve_neg() if x.is_neg() else x
        kept: list[Tensor] = []
        g, total = None if dy is None else self._tensor(dy, x), torch.empty_like(x)
        self._add_ends_gradient(
            where(x),
            dy=0 if g is None else g.data_ptr(),
            x=x.data_ptr(),
            ends=ends.data_ptr(),
            d_ends=self._vector(d_ends, kept),
            total=total.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return total


class Taps(contract.Taps):
    """The taps of several tensors of one type, all served in one call."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        first, numels = xs[0], [x.numel() for x in xs]
        engine, settings = engine_for(first), {"dtype": DTYPES[first.dtype], "numels": numels}
        self._ends = engine.prepare_taps_ends(settings)
        self._add_ends_gradients = engine.prepare_taps_add_ends_gradients(settings)
        self._four = new_vector(first, len(xs), 4)  # what results are made like
        # The CPU loops have scratch memory of their own.
        on_host = engine.in_host_memory
        self._scratch_size = 0 if on_host else max(engine.scratch_bytes((1, 1, n)) for n in numels) // 8

    def ends(self, xs: Sequence[Tensor]) -> Tensor:
        """Return the ends of each tensor, ``(n, 4)``."""
        xs, ends = _resolved(xs), torch.empty_like(self._four)
        x, scratch = _addresses(xs), self._scratch(ends)
        self._ends(where(ends), x=_start(x), ends=ends.data_ptr(), scratch=_address(scratch))
        return ends

    def add_ends_gradients(
        self, dys: Sequence[Tensor | None], xs: Sequence[Tensor], ends: Tensor, d_ends: Tensor
    ) -> list[Tensor]:
        """Return each ``dy`` plus the gradient that its row of ``d_ends`` gives ``x``."""
        xs, totals = _resolved(xs), [torch.empty_like(x) for x in xs]
        grads = [None if dy is None else beside(dy, x) for dy, x in zip(dys, xs, strict=True)]
        d_ends, scratch = d_ends.to(ends.dtype).contiguous(), self._scratch(ends)
        dy, x, total = _addresses(grads), _addresses(xs), _addresses(totals)
        self._add_ends_gradients(
            where(ends),
            dy=_start(dy),
            x=_start(x),
            ends=ends.data_ptr(),
            d_ends=d_ends.data_ptr(),
            total=_start(total),
            scratch=_address(scratch),
        )
        return totals

    def _scratch(self, like: Tensor) -> Tensor | None:
        """Return memory for partial results; None on the host."""
        return like.new_empty((self._scratch_size,), dtype=torch.float64) if self._scratch_size else None


def _resolved(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.resolve_neg() if x.is_neg() else x for x in xs]


def _addresses(tensors: Sequence[Tensor | None]) -> array[int]:
    """Return the addresses of tensors as memory that a pass reads; 0 stands for None."""
    return array("Q", map(_address, tensors))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _start(addresses: array[int]) -> int:
    return addresses.buffer_info()[0]


class FakeQuantize(Prepared):
    """Fake quantization with one scale and zero point for the tensor."""

    def __init__(self, x: Tensor, codes: tuple[int, int]) -> None:
        super().__init__(x, settings_of(x, None, code_min=codes[0], code_max=codes[1]))
        self._forward = self._prepare("fake_quantize_forward")
        self._backward = self._prepare("fake_quantize_backward")
        self._double_backward = self._prepare("fake_quantize_double_backward")

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``x`` quantized and dequantized."""
        x = x.resolve_neg() if x.is_neg() else x
        kept: list[Tensor] = []
        y = torch.empty_like(x)
        self._forward(
            where(x),
            x=x.data_ptr(),
            scale=self._vector(scale, kept),
            zero_point=self._vector(zero_point, kept),
            y=y.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return y

    def backward(
        self, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, with_l1: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``dx, l1``."""
        x = x.resolve_neg() if x.is_neg() else x
        kept: list[Tensor] = []
        g, dx, l1 = self._tensor(dy, x), torch.empty_like(x), None
        if with_l1:
            l1 = torch.empty_like(self._scalar)
        self._backward(
            where(x),
            dy=g.data_ptr(),
            x=x.data_ptr(),
            scale=self._vector(scale, kept),
            zero_point=self._vector(zero_point, kept),
            dx=dx.data_ptr(),
            l1=0 if l1 is None else l1.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return dx, l1

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
        if d_dx is None and d_l1 is None:
            return torch.zeros_like(x)
        x = x.resolve_neg() if x.is_neg() else x
        kept: list[Tensor] = []
        v, g, d_dy = None if d_dx is None else self._tensor(d_dx, x), self._tensor(dy, x), torch.empty_like(x)
        self._double_backward(
            where(x),
            d_dx=0 if v is None else v.data_ptr(),
            d_l1=self._vector(d_l1, kept),
            dy=g.data_ptr(),
            x=x.data_ptr(),
            scale=self._vector(scale, kept),
            zero_point=self._vector(zero_point, kept),
            d_dy=d_dy.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return d_dy


def prepare_tap(x: Tensor) -> Tap | None:
    """Prepare the tap of tensors like ``x``; None if their memory has gaps."""
    return Tap(x) if dense(x) is x else None


def prepare_taps(xs: Sequence[Tensor]) -> Taps | None:
    """Prepare the taps of tensors like ``xs``; None if the memory of one has gaps, or they differ in type."""
    same = len({(x.dtype, x.device) for x in xs}) == 1
    return Taps(xs) if same and all(dense(x) is x for x in xs) else None


def prepare_fake_quantize(x: Tensor, codes: tuple[int, int]) -> FakeQuantize | None:
    """Prepare fake quantization of tensors like ``x``; None if their memory has gaps."""
    return FakeQuantize(x, codes) if dense(x) is x else None
