"""Operations prepared once for a shape: the cut of the tensor into tiles is made once, calls launch.

The ends of y come out of the pass that writes it, and their gradient enters the passes that read dy: no
tensor is read once more for them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradl1_fast.backends.reference._tensors import widen
from gradl1_fast.backends.triton import _batch_norm_act_kernels as kernels
from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._ends import finish_ends, partials_of_ends
from gradl1_fast.backends.triton._tiles import plan, walkable

__all__ = ["BatchNormAct", "prepare_batch_norm_act"]


class BatchNormAct:
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
        self._cut, self._training, self._eps, self._activation = plan(x), training, eps, activation
        self._with_residual, self._with_ends = with_residual, with_ends
        self._codes = None if codes is None else (float(codes[0]), float(codes[1]))
        self._masks = activation != "none" or codes is not None

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
        cut, x = self._cut, x.resolve_neg()
        with _launch.on_device_of(x):
            y = torch.empty_like(x)
            activated = torch.empty_like(x) if self._with_residual and self._codes is not None else None
            if self._training:
                mean, rstd = self._statistics(x)
            else:
                # A copy: an operator must not return what it was given.
                mean, rstd = _wide(running_mean).clone(), (_wide(running_var) + self._eps).rsqrt()
            partials = partials_of_ends(x, cut.grid[0]) if self._with_ends else None
            kernels._batch_norm_act_forward_kernel[cut.grid](
                x,
                _vector(weight),
                _vector(bias),
                mean,
                rstd,
                _launch.in_layout_of(residual, x),
                self._quantizer(scale, zero_point),
                y,
                activated,
                partials,
                ACTIVATION=self._activation,
                **cut.arguments,
            )
            return y, activated, mean, rstd, None if partials is None else finish_ends(partials)

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
        """Return ``dx, dweight, dbias, dresidual, l1`` of ``dy`` plus what ``d_ends`` gives to ``y``."""
        cut, x = self._cut, x.resolve_neg()
        with _launch.on_device_of(x):
            weight, bias, quantizer = _vector(weight), _vector(bias), self._quantizer(scale, zero_point)
            dx, dy, d_ends = torch.empty_like(x), _launch.in_layout_of(dy, x), _vector(d_ends)
            ends = None if d_ends is None else ends
            own_residual = self._with_residual and (self._masks or d_ends is not None)
            dresidual = torch.empty_like(x) if own_residual else None
            sums = _launch.partials(x, 2 + with_l1, cut.splits, cut.channels)
            kernels._batch_norm_act_backward_sums_kernel[cut.grid](
                dy,
                x,
                _launch.in_layout_of(activated, x) if own_residual else None,
                weight,
                bias,
                mean,
                rstd,
                quantizer,
                ends,
                d_ends,
                dresidual,
                sums,
                ACTIVATION=self._activation,
                WITH_L1=with_l1,
                **cut.arguments,
            )
            dbias, dweight, *l1 = (torch.empty_like(mean) for _ in range(2 + with_l1))
            _launch.finish(sums, (dbias, dweight, *l1))
            # What goes to the residual has been masked already, and has its share of the ends.
            first = dresidual is None
            kernels._batch_norm_act_backward_kernel[cut.grid](
                dy if dresidual is None else dresidual,
                x,
                weight,
                bias,
                mean,
                rstd,
                quantizer if first else None,
                ends if first else None,
                d_ends if first else None,
                dweight,
                dbias,
                dx,
                cut.size_of_channel,
                ACTIVATION=self._activation if first else "none",
                TRAINING=self._training,
                **cut.arguments,
            )
            return dx, dweight, dbias, dresidual, _launch.total(l1[0]) if with_l1 else None

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
        cut, x = self._cut, x.resolve_neg()
        with _launch.on_device_of(x):
            d_dy, d_x, d_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mean)
            d_dx, d_dresidual, gradient = (_launch.in_layout_of(t, x) for t in (d_dx, d_dresidual, dy))
            read = activated if self._with_residual and self._masks else None
            vectors = (_vector(weight), _vector(bias), mean, rstd)
            quantizer = self._quantizer(scale, zero_point)
            saved = (gradient, x, _launch.in_layout_of(read, x), *vectors, quantizer)
            shares = _launch.partials(x, 5, cut.splits, cut.channels)
            kernels._batch_norm_act_double_backward_sums_kernel[cut.grid](
                d_dx, *saved, shares, ACTIVATION=self._activation, **cut.arguments
            )
            sums = _launch.partials(x, 5, cut.channels).unbind()
            _launch.finish(shares, sums)
            kernels._batch_norm_act_double_backward_kernel[cut.grid](
                d_dx,
                _vector(d_dweight),
                _vector(d_dbias),
                d_dresidual,
                d_l1,
                *saved,
                sums,
                d_dy,
                d_x,
                d_weight,
                cut.size_of_channel,
                ACTIVATION=self._activation,
                TRAINING=self._training,
                **cut.arguments,
            )
            return d_dy, d_x, d_weight

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and 1/std of each channel."""
        cut = self._cut
        shares = _launch.partials(x, 3, cut.splits, cut.channels)
        kernels._batch_norm_act_statistics_kernel[cut.grid](x, shares, **cut.arguments)
        mean, rstd = _launch.partials(x, cut.channels), _launch.partials(x, cut.channels)
        width = min(triton.next_power_of_2(cut.channels), 32)
        kernels._batch_norm_act_statistics_finish_kernel[(triton.cdiv(cut.channels, width),)](
            x,
            shares,
            mean,
            rstd,
            1 if cut.arguments["LAST"] else cut.arguments["width"],
            cut.splits,
            cut.channels,
            EPS=self._eps,
            ROWS=256 // width,
            COLS=width,
            **_launch.OPTIONS,
        )
        return mean, rstd

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


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _wide(values: Tensor | None) -> Tensor:
    assert values is not None  # the caller checks that evaluation has its statistics
    return widen(values)
