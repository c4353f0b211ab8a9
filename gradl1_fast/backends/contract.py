"""Raw operations that are prepared once for tensors of one shape, layout, type and device.

A planned region calls the same passes in every step. Preparation fixes what does not change between calls:
sizes, layout and options. A call then takes only tensors. The caller guarantees that they have the shapes,
strides, types and devices of preparation.

``None`` stands for a missing incoming gradient and for a result that was not requested. Arguments are neither
changed nor returned. The results are bitwise equal to those of the raw passes of the same name.

A backend that cannot prepare an operation for a tensor, such as one with gaps in memory, does not define the
function or returns None from it. Its raw passes are called instead.

``ends`` are four numbers in the type of sums: the smallest and the largest value of a tensor, and the number
of values equal to each. ``d_ends`` are the gradients of the first two. They are shared evenly among equal
values, as in ``torch.amin`` and ``torch.amax``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype

__all__ = [
    "BatchNormAct",
    "FakeQuantize",
    "Tap",
    "Taps",
    "prepare_batch_norm_act",
    "prepare_fake_quantize",
    "prepare_tap",
    "prepare_taps",
    "signs_of_ends",
]


class BatchNormAct(Protocol):
    """``y = q(act(norm(x) * weight + bias + residual))`` and its derivatives.

    ``activated`` determines the mask: the input of q with a grid and a residual, ``y`` without a grid.
    """

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        zero_point: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """Return ``y, activated, mean, rstd, ends``; the ends of ``y`` if prepared with them."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        activated: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        with_l1: bool,
        ends: Tensor | None,
        d_ends: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return ``dx, dweight, dbias, dresidual, l1`` for ``dy`` plus the gradient through ``d_ends``.

        ``dresidual`` is None without a residual, and if it equals ``dy`` because there is no activation, grid
        or ``d_ends``.
        """

    def double_backward(
        self,
        d_dx: Tensor | None,
        d_dweight: Tensor | None,
        d_dbias: Tensor | None,
        d_dresidual: Tensor | None,
        d_l1: Tensor | None,
        dy: Tensor,
        x: Tensor,
        activated: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``d_dy, d_x, d_weight``."""


class Tap(Protocol):
    """The identity, which measures the norm of its gradient and the ends of its input."""

    def ends(self, x: Tensor) -> Tensor:
        """Return the ends of ``x``."""

    def backward(self, dy: Tensor) -> Tensor:
        """Return ``l1 = sum |dy|``."""

    def double_backward(self, d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
        """Return ``d_dy = d_dx + d_l1 * sign(dy)``."""

    def add_ends_gradient(self, dy: Tensor | None, x: Tensor, ends: Tensor, d_ends: Tensor) -> Tensor:
        """Return ``dy`` plus the gradient that ``d_ends`` gives ``x``."""


class Taps:
    """The taps of several tensors. A backend may replace it to serve all tensors in one call."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = taps

    def ends(self, xs: Sequence[Tensor]) -> Tensor:
        """Return the ends of each tensor, ``(n, 4)``."""
        return torch.stack([tap.ends(x) for tap, x in zip(self._taps, xs, strict=True)])

    def add_ends_gradients(
        self, dys: Sequence[Tensor | None], xs: Sequence[Tensor], ends: Tensor, d_ends: Tensor
    ) -> list[Tensor]:
        """Return each ``dy`` plus the gradient that its row of ``d_ends`` gives ``x``."""
        rows = zip(self._taps, dys, xs, ends.unbind(), d_ends.unbind(), strict=True)
        return [tap.add_ends_gradient(dy, x, end, d) for tap, dy, x, end, d in rows]


class FakeQuantize(Protocol):
    """Per-tensor fake quantization."""

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid."""

    def backward(
        self, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, with_l1: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``dx, l1``."""

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


def signs_of_ends(ends: Tensor) -> Tensor:
    """Return ``[-1, 1]``, the signs of the smallest and the largest value, in the type of ``ends``."""
    return _signs(ends.dtype, ends.device)


@functools.lru_cache(maxsize=8)
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the tensor is kept for later steps
        return torch.tensor([-1.0, 1.0], dtype=dtype, device=device)


def prepare_batch_norm_act(
    backend: ModuleType,
    x: Tensor,
    *,
    training: bool,
    eps: float,
    activation: str,
    with_residual: bool,
    codes: tuple[int, int] | None,
    with_ends: bool,
) -> BatchNormAct:
    """Prepare a batch norm with residual, activation and quantizer.

    Args:
        backend: the backend that computes.
        x: ``(N, C, *size)``, an example of the tensors of later calls.
        training: normalise with the statistics of the batch.
        eps: added to the variance.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        with_residual: whether there is a residual, of the shape, layout and type of ``x``.
        codes: the smallest and the largest code of the grid; None without a grid.
        with_ends: whether to return the ends of ``y``; not with a grid.
    """
    prepare = getattr(backend, "prepare_batch_norm_act", None)
    options = (training, eps, activation, with_residual, codes, with_ends)
    prepared = None if prepare is None or not x.numel() else prepare(x, *options)
    return _BatchNormAct(backend, *options) if prepared is None else prepared


def prepare_tap(backend: ModuleType, x: Tensor) -> Tap:
    """Prepare the tap of tensors like ``x``."""
    prepare = getattr(backend, "prepare_tap", None)
    prepared = None if prepare is None or not x.numel() else prepare(x)
    return _Tap(backend) if prepared is None else prepared


def prepare_taps(backend: ModuleType, xs: Sequence[Tensor]) -> Taps:
    """Prepare the taps of tensors like ``xs``, in this order."""
    prepare = getattr(backend, "prepare_taps", None)
    prepared: Taps | None = None if prepare is None else prepare(xs)
    return Taps([prepare_tap(backend, x) for x in xs]) if prepared is None else prepared


def prepare_fake_quantize(backend: ModuleType, x: Tensor, codes: tuple[int, int]) -> FakeQuantize:
    """Prepare fake quantization of tensors like ``x``, given the smallest and the largest code."""
    prepare = getattr(backend, "prepare_fake_quantize", None)
    prepared = None if prepare is None or not x.numel() else prepare(x, codes)
    return _FakeQuantize(backend, codes) if prepared is None else prepared


class _BatchNormAct:
    """Calls the raw passes of a backend that cannot prepare the operation."""

    def __init__(
        self,
        backend: ModuleType,
        training: bool,
        eps: float,
        activation: str,
        with_residual: bool,
        codes: tuple[int, int] | None,
        with_ends: bool,
    ) -> None:
        self._backend, self._codes = backend, codes or (0, 0)
        self._training, self._eps, self._activation = training, eps, activation
        self._with_residual, self._with_ends = with_residual, with_ends

    def forward(self, x, weight, bias, running_mean, running_var, residual, scale, zero_point):  # type: ignore[no-untyped-def]
        y, activated, mean, rstd = self._backend.batch_norm_act_forward(
            x, weight, bias, running_mean, running_var, residual, scale, zero_point, *self._codes,
            self._training, self._eps, self._activation,
        )  # fmt: skip
        mask_source = None if scale is None or residual is None else activated
        return y, mask_source, mean, rstd, _ends(y) if self._with_ends else None

    def backward(self, dy, x, activated, weight, bias, mean, rstd, scale, zero_point, with_l1, ends, d_ends):  # type: ignore[no-untyped-def]
        total = dy if d_ends is None else _add_ends_gradient(dy, activated, ends, d_ends)
        dx, dweight, dbias, dresidual, l1 = self._backend.batch_norm_act_backward(
            total, x, activated, weight, bias, mean, rstd, scale, zero_point, *self._codes, self._training,
            self._activation, self._with_residual, with_l1,
        )  # fmt: skip
        if not (self._with_residual and (scale is not None or self._activation != "none")):
            dresidual = total if self._with_residual and d_ends is not None else None
        return dx, dweight, dbias, dresidual, l1 if with_l1 else None

    def double_backward(  # type: ignore[no-untyped-def]
        self, d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd, scale,
        zero_point,
    ):  # fmt: skip
        return self._backend.batch_norm_act_double_backward(
            d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd, scale,
            zero_point, *self._codes, self._training, self._activation, self._with_residual,
        )  # fmt: skip


class _Tap:
    """Calls the raw passes of a backend that cannot prepare the operation."""

    def __init__(self, backend: ModuleType) -> None:
        self.backward, self.double_backward = backend.tap_backward, backend.tap_double_backward

    def ends(self, x: Tensor) -> Tensor:
        return _ends(x)

    def add_ends_gradient(self, dy: Tensor | None, x: Tensor, ends: Tensor, d_ends: Tensor) -> Tensor:
        return _add_ends_gradient(dy, x, ends, d_ends)


class _FakeQuantize:
    """Calls the raw passes of a backend that cannot prepare the operation."""

    def __init__(self, backend: ModuleType, codes: tuple[int, int]) -> None:
        self._backend, self._codes = backend, codes

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self._backend.fake_quantize_forward(x, scale, zero_point, *self._codes, None)

    def backward(self, dy, x, scale, zero_point, with_l1):  # type: ignore[no-untyped-def]
        dx, l1 = self._backend.fake_quantize_backward(dy, x, scale, zero_point, *self._codes, None, with_l1)
        return dx, l1 if with_l1 else None

    def double_backward(self, d_dx, d_l1, dy, x, scale, zero_point):  # type: ignore[no-untyped-def]
        return self._backend.fake_quantize_double_backward(
            d_dx, d_l1, dy, x, scale, zero_point, *self._codes, None
        )


def _ends(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    counts = (x == low).sum(), (x == high).sum()
    return torch.stack([value.to(sum_dtype(x.dtype)) for value in (low, high, *counts)])


def _add_ends_gradient(dy: Tensor | None, x: Tensor, ends: Tensor, d_ends: Tensor) -> Tensor:
    shares = (d_ends / ends[2:]).unbind()
    out = torch.zeros_like(x) if dy is None else dy
    for value, share in zip(ends[:2].to(x.dtype).unbind(), shares, strict=True):
        out = out + (x == value) * share.to(x.dtype)
    return out
