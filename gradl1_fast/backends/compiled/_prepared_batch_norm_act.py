"""batch_norm_act prepared by the extension for one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends.compiled import batch_norm_act
from gradl1_fast.backends.compiled._prepared import Prepared
from gradl1_fast.backends.compiled._tensors import dense, new_vector, where

__all__ = ["BatchNormAct", "prepare_batch_norm_act"]


class BatchNormAct(Prepared):
    """``y = q(act(norm(x) * weight + bias + residual))`` and its derivatives.

    The mask is recomputed from ``x``; ``activated`` is read only if a residual was added.
    """

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
        super().__init__(
            x,
            batch_norm_act.settings_of_batch_norm_act(
                x, training, eps, activation, with_residual, codes, with_ends
            ),
        )
        self._training, self._activation, self._codes = training, activation, codes or (0, 0)
        self._with_residual, self._with_ends = with_residual, with_ends
        self._masks = activation != "none" or codes is not None
        self._keeps_activated = with_residual and codes is not None
        self._channels = new_vector(x, x.shape[1])  # what results are made like
        self._forward = self._prepare("batch_norm_act_forward")
        self._backward = self._prepare("batch_norm_act_backward")
        self._double_backward = self._prepare("batch_norm_act_double_backward")

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
        x, new, vector = x.resolve_neg() if x.is_neg() else x, torch.empty_like, self._vector
        kept: list[Tensor] = []
        y, mean, rstd = new(x), new(self._channels), new(self._channels)
        added = None if residual is None else self._tensor(residual, x)
        activated = new(x) if self._keeps_activated else None
        ends = new(self._four) if self._with_ends else None
        self._forward(
            where(x),
            x=x.data_ptr(),
            weight=vector(weight, kept),
            bias=vector(bias, kept),
            running_mean=0 if self._training else vector(running_mean, kept),
            running_var=0 if self._training else vector(running_var, kept),
            residual=0 if added is None else added.data_ptr(),
            scale=vector(scale, kept),
            zero_point=vector(zero_point, kept),
            y=y.data_ptr(),
            activated=0 if activated is None else activated.data_ptr(),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            ends=0 if ends is None else ends.data_ptr(),
            scratch=self._scratch(x, kept),
        )
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
        x, new, vector = x.resolve_neg() if x.is_neg() else x, torch.empty_like, self._vector
        kept: list[Tensor] = []
        g, a = self._tensor(dy, x), self._mask_source(activated, x, d_ends is not None)
        dx, dweight, dbias = new(x), new(mean), new(mean)
        dresidual, l1 = None if a is None else new(x), new(self._scalar) if with_l1 else None
        self._backward(
            where(x),
            d_ends=vector(d_ends, kept),
            ends=0 if ends is None else ends.data_ptr(),
            dy=g.data_ptr(),
            x=x.data_ptr(),
            activated=0 if a is None else a.data_ptr(),
            weight=vector(weight, kept),
            bias=vector(bias, kept),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            scale=vector(scale, kept),
            zero_point=vector(zero_point, kept),
            dx=dx.data_ptr(),
            dweight=dweight.data_ptr(),
            dbias=dbias.data_ptr(),
            dresidual=0 if dresidual is None else dresidual.data_ptr(),
            l1=0 if l1 is None else l1.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return dx, dweight, dbias, dresidual, l1

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
        if d_dresidual is not None and not self._masks:
            return batch_norm_act.batch_norm_act_double_backward(
                d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd,
                scale, zero_point, *self._codes, self._training, self._activation, self._with_residual,
            )  # fmt: skip
        x, new, vector = x.resolve_neg() if x.is_neg() else x, torch.empty_like, self._vector
        kept: list[Tensor] = []
        g, a = self._tensor(dy, x), self._mask_source(activated, x, False)
        v = torch.zeros_like(x) if d_dx is None else self._tensor(d_dx, x)
        u = None if d_dresidual is None else self._tensor(d_dresidual, x)
        d_dy, d_x, d_weight = new(x), new(x), new(mean)
        self._double_backward(
            where(x),
            d_dx=v.data_ptr(),
            d_dweight=vector(d_dweight, kept),
            d_dbias=vector(d_dbias, kept),
            d_dresidual=0 if u is None else u.data_ptr(),
            d_l1=vector(d_l1, kept),
            dy=g.data_ptr(),
            x=x.data_ptr(),
            activated=0 if a is None else a.data_ptr(),
            weight=vector(weight, kept),
            bias=vector(bias, kept),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            scale=vector(scale, kept),
            zero_point=vector(zero_point, kept),
            d_dy=d_dy.data_ptr(),
            d_x=d_x.data_ptr(),
            d_weight=d_weight.data_ptr(),
            scratch=self._scratch(x, kept),
        )
        return d_dy, d_x, d_weight

    def _mask_source(self, activated: Tensor | None, x: Tensor, with_ends: bool) -> Tensor | None:
        """Return the output of the activation if mask and ends cannot be recomputed from ``x``."""
        if activated is None or not self._with_residual or not (self._masks or with_ends):
            return None
        return self._tensor(activated, x)


def prepare_batch_norm_act(
    x: Tensor,
    training: bool,
    eps: float,
    activation: str,
    with_residual: bool,
    codes: tuple[int, int] | None,
    with_ends: bool,
) -> BatchNormAct | None:
    """Prepare batch norm of tensors like ``x``; None if their memory has gaps."""
    if dense(x) is not x:
        return None
    return BatchNormAct(x, training, eps, activation, with_residual, codes, with_ends)
