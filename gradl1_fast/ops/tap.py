"""Operators of the tap: the identity whose probe receives ``sum |dy|``.

Derivation: ``dx = dy`` and ``l1 = sum |dy|``, so ``d_dy = d_dx + d_l1 * sign(dy)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.ops._library import Operator, recorded


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> Tensor:
        return x.view_as(x)  # the operator would have to copy

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        # The l1 term is needed only for double backprop, so an ordinary backward pass skips it.
        return _TapBackward.apply(dy) if torch.is_grad_enabled() else (dy, None)


class _Alias(_Tap):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> Tensor:
        return x.detach()  # shares memory and version counter


class _TapBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy)
        return dy.view_as(dy), tap_backward.values(dy)

    @staticmethod
    def backward(ctx: Any, d_dx: Tensor | None, d_l1: Tensor | None) -> Tensor:
        return tap_double_backward(d_dx, d_l1, *ctx.saved_tensors)


class _ScaleProbe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probe: Tensor, scale: list[Tensor]) -> Tensor:
        # In a list, the scale is saved without becoming an edge: the first backward has no gradient for it.
        ctx.save_for_backward(*scale)
        ctx.set_materialize_grads(False)
        return probe.view_as(probe)

    @staticmethod
    def backward(ctx: Any, l1: Tensor | None) -> tuple[Tensor | None, None]:
        (scale,) = ctx.saved_tensors
        return None if l1 is None else l1 * scale, None


def _tap_kernel(values: Callable[..., Any], x: Tensor, probe: Tensor) -> Any:
    return _Tap.apply(x, probe) if recorded(x, probe) else values(x, probe)


def _alias_kernel(values: Callable[..., Any], x: Tensor, probe: Tensor) -> Any:
    return _Alias.apply(x, probe) if recorded(x, probe) else values(x, probe)


def _scale_probe_kernel(values: Callable[..., Any], probe: Tensor, scale: Tensor) -> Any:
    return _ScaleProbe.apply(probe, [scale]) if recorded(probe) else values(probe, scale)


def alias(x: Tensor, probe: Tensor) -> Tensor:
    """Tap ``x`` without making the result a view of ``x``, for results that are used only by the caller.

    An in-place change of the result also changes ``x``, but autograd does not see this: code that reads ``x``
    afterwards gets a wrong gradient without an error. :func:`gradl1_fast.functional.tap` returns a view, for
    which autograd refuses in-place changes.
    """
    return tap_alias(x, probe) if torch.is_grad_enabled() and probe.requires_grad else x


def _save_dy(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _l1_alone(ctx: Any, d_l1: Tensor) -> tuple[Tensor]:
    return (tap_double_backward(None, d_l1, *ctx.saved_tensors),)


tap_forward = Operator(
    "tap",
    "tap_forward(Tensor x, Tensor probe) -> Tensor",
    lambda x, probe: torch.empty_like(x),
    compute=lambda x, probe: x.clone(),
)
tap_alias = Operator(
    "tap",
    "tap_alias(Tensor x, Tensor probe) -> Tensor",
    lambda x, probe: torch.empty_like(x),
    compute=lambda x, probe: x.clone(),
)
scale_probe = Operator(
    "tap",
    "scale_probe(Tensor probe, Tensor scale) -> Tensor",
    lambda probe, scale: torch.empty_like(probe),
    compute=lambda probe, scale: probe.clone(),
)
tap_backward = Operator(
    "tap",
    "tap_backward(Tensor dy) -> Tensor",
    lambda dy: dy.new_empty((), dtype=sum_dtype(dy.dtype)),
)
tap_double_backward = Operator(
    "tap",
    "tap_double_backward(Tensor? d_dx, Tensor? d_l1, Tensor dy) -> Tensor",
    lambda d_dx, d_l1, dy: torch.empty_like(dy),
)
tap_forward.differentiate_by(_tap_kernel)
tap_alias.differentiate_by(_alias_kernel)
scale_probe.differentiate_by(_scale_probe_kernel)
tap_backward.differentiate(_save_dy, _l1_alone)
tap_double_backward.refuse_third_order()
