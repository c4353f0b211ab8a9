"""``batch_norm_act`` prepared for a shape: tiles are chosen once; calls only launch kernels.

The ends of y come out of the pass that writes it, and their gradient enters the passes that read dy: no
tensor is read once more for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import widen
from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._batch_norm_act_launches import Launches
from gradl1_fast.backends.triton._ends import PARTIALS
from gradl1_fast.backends.triton._launch import Kind, kind_of
from gradl1_fast.backends.triton._prepared import Prepared
from gradl1_fast.backends.triton._tiles import walkable

__all__ = ["BatchNormAct", "prepare_batch_norm_act"]


class BatchNormAct(Prepared):
    """``y = q(act(norm(x) * weight + bias + residual))`` and its derivatives, for a walkable ``x``."""

    def __init__(
        self,
        x: Tensor,
        training: bool,
        eps: float,
        activation: str,
        with_residual: bool,
        codes: tuple[int, int] | None,
        with_ends: bool,
    ) -> None:
        super().__init__(x)
        self._launches = Launches(x, training, eps, activation)
        self._training, self._eps = training, eps
        self._with_residual, self._with_ends = with_residual, with_ends
        self._codes = None if codes is None else (float(codes[0]), float(codes[1]))
        self._masks = activation != "none" or codes is not None
        cut = self._launches.cut
        self._splits, self._channels, self._programs = cut.splits, cut.channels, cut.grid[0]
        self._vector = self._scalar.new_empty((cut.channels,))  # what results are made like
        self._five = self._scalar.new_empty((5, cut.channels))

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
        """Return ``y, activated, mean, rstd, ends``."""
        x, do, new = x.resolve_neg(), self._launches, torch.empty_like
        with _launch.on_device_of(x):
            weight, bias, residual = _dense(weight), _dense(bias), self._in_layout(residual, x)
            kind = kind_of(x, weight, bias, running_mean, running_var, residual, scale, zero_point)
            y, ends = new(x), new(self._ends) if self._with_ends else None
            activated = new(x) if self._with_residual and self._codes is not None else None
            if self._training:
                mean, rstd = self._statistics(kind, x)
            else:
                # A copy: an operator must not return what it was given.
                mean, rstd = _wide(running_mean).clone(), (_wide(running_var) + self._eps).rsqrt()
            quantizer = self._quantizer(scale, zero_point)
            parts = None if ends is None else self._scalar.new_empty((PARTIALS, self._programs))
            do.forward(kind, x, weight, bias, mean, rstd, residual, quantizer, y, activated, parts)
            if ends is not None:
                do.ends_finish(kind, parts, ends)
            return y, activated, mean, rstd, ends

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
        """Return ``dx, dweight, dbias, dresidual, l1`` for ``dy`` plus the gradient through ``d_ends``."""
        x, do, new = x.resolve_neg(), self._launches, torch.empty_like
        with _launch.on_device_of(x):
            weight, bias, quantizer = _dense(weight), _dense(bias), self._quantizer(scale, zero_point)
            d_ends, g = _dense(d_ends), self._in_layout(dy, x)
            ends = None if d_ends is None else ends
            own_residual = self._with_residual and (self._masks or d_ends is not None)
            a = self._in_layout(activated, x) if own_residual else None
            kind = kind_of(g, x, a, weight, bias, mean, rstd, scale, zero_point, ends, d_ends)
            dx, dresidual, sums = new(x), new(x) if own_residual else None, self._partials(2 + with_l1)
            channels = weight, bias, mean, rstd
            do.backward_sums[with_l1](kind, g, x, a, *channels, quantizer, ends, d_ends, dresidual, sums)
            dbias, dweight, norms = new(self._vector), new(self._vector), None
            if with_l1:
                norms = new(self._vector)
            do.finish(kind, sums, (dbias, dweight) if norms is None else (dbias, dweight, norms))
            if dresidual is None:
                rest = quantizer, ends, d_ends
                do.backward[1](kind, g, x, *channels, *rest, dweight, dbias, dx)
            else:  # what goes to the residual has been masked already, and has its share of the ends
                do.backward[0](kind, dresidual, x, *channels, None, None, None, dweight, dbias, dx)
            return dx, dweight, dbias, dresidual, None if norms is None else self._total(kind, norms)

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
        x, do, new = x.resolve_neg(), self._launches, torch.empty_like
        with _launch.on_device_of(x):
            v, u, g = (self._in_layout(t, x) for t in (d_dx, d_dresidual, dy))
            a = self._in_layout(activated, x) if self._with_residual and self._masks else None
            channels = _dense(weight), _dense(bias), mean, rstd
            given = v, _dense(d_dweight), _dense(d_dbias), u, d_l1
            kind = kind_of(*given, g, x, a, *channels, scale, zero_point)
            saved = g, x, a, *channels, self._quantizer(scale, zero_point)
            shares, sums = self._partials(5), new(self._five)
            do.double_backward_sums(kind, v, *saved, shares)
            do.double_backward_finish(kind, shares, sums)
            d_dy, d_x, d_weight = new(x), new(x), new(self._vector)
            do.double_backward(kind, *given, *saved, sums, d_dy, d_x, d_weight)
            return d_dy, d_x, d_weight

    def _partials(self, count: int) -> Tensor:
        return self._scalar.new_empty((count, self._splits, self._channels))

    def _statistics(self, kind: Kind, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and 1/std of each channel."""
        shares = self._partials(3)
        mean, rstd = torch.empty_like(self._vector), torch.empty_like(self._vector)
        self._launches.statistics(kind, x, shares)
        self._launches.statistics_finish(kind, x, shares, mean, rstd)
        return mean, rstd

    def _total(self, kind: Kind, norms: Tensor) -> Tensor:
        total = torch.empty_like(self._scalar)
        self._launches.total(kind, norms, (total,))
        return total

    def _quantizer(
        self, scale: Tensor | None, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor, float, float] | None:
        if self._codes is None or scale is None or zero_point is None:
            return None
        return scale, zero_point, *self._codes


def prepare_batch_norm_act(
    x: Tensor,
    training: bool,
    eps: float,
    activation: str,
    with_residual: bool,
    codes: tuple[int, int] | None,
    with_ends: bool,
) -> BatchNormAct | None:
    """Prepare batch norm of tensors like ``x``; None if they are neither NCHW nor channels_last."""
    if walkable(x) is not x:
        return None
    return BatchNormAct(x, training, eps, activation, with_residual, codes, with_ends)


def _dense(t: Tensor | None) -> Tensor | None:
    """Return the values in their order in memory, without a copy."""
    if t is None or (t.is_contiguous() and not t.is_neg()):
        return t
    return t.resolve_neg().contiguous()


def _wide(values: Tensor | None) -> Tensor:
    assert values is not None  # the caller checks that evaluation has its statistics
    return widen(values)
