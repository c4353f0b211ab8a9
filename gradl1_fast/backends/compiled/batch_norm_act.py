"""batch_norm_act computed by the extension.

The mask is recomputed from ``x``; ``activated`` is read only if a residual was added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast._masks import is_masked
from gradl1_fast.backends import reference
from gradl1_fast.backends.compiled._tensors import (
    Settings,
    beside,
    dense,
    new_vector,
    run,
    scratch,
    settings_of,
    vector,
)
from gradl1_fast.backends.reference._tensors import absent

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


def batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    q_min: int,
    q_max: int,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``y = q(act(norm(x) * weight + bias + residual))``, ``activated``, mean and 1/std."""
    if not x.numel():
        return reference.batch_norm_act_forward(
            x, weight, bias, running_mean, running_var, residual, scale, zero_point, q_min, q_max,
            training, eps, activation,
        )  # fmt: skip
    x = dense(x)
    added = None if residual is None else beside(residual.expand_as(x), x)
    settings = settings_of_batch_norm_act(
        x, training, eps, activation, added is not None, None if scale is None else (q_min, q_max)
    )
    y, mean, rstd = torch.empty_like(x), new_vector(x, x.shape[1]), new_vector(x, x.shape[1])
    activated = None if added is None or scale is None else torch.empty_like(x)
    statistics = {} if training else {"running_mean": running_mean, "running_var": running_var}
    channels = {"weight": weight, "bias": bias, **statistics}
    run(
        "batch_norm_act_forward", x, settings,
        x=x, **_vectors(x, **channels, scale=scale, zero_point=zero_point), residual=added,
        y=y, activated=activated, mean=mean, rstd=rstd, scratch=scratch(x, settings),
    )  # fmt: skip
    return y, absent(x) if activated is None else activated, mean, rstd


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    activated: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    q_min: int,
    q_max: int,
    training: bool,
    activation: str,
    with_residual: bool,
    with_l1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``dx, dweight, dbias, dresidual, l1`` with ``l1 = sum |dy|``."""
    if not x.numel():
        return reference.batch_norm_act_backward(
            dy, x, activated, weight, bias, mean, rstd, scale, zero_point, q_min, q_max,
            training, activation, with_residual, with_l1,
        )  # fmt: skip
    x = dense(x)
    settings = settings_of_batch_norm_act(
        x, training, 0.0, activation, with_residual, None if scale is None else (q_min, q_max)
    )
    mask = _mask_source(activated, x, with_residual and is_masked(activation, scale))
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    dresidual, l1 = None if mask is None else torch.empty_like(x), new_vector(x) if with_l1 else None
    channels = {"weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    run(
        "batch_norm_act_backward", x, settings,
        dy=beside(dy, x), x=x, activated=mask, **_vectors(x, **channels, scale=scale, zero_point=zero_point),
        dx=dx, dweight=dweight, dbias=dbias, dresidual=dresidual, l1=l1, scratch=scratch(x, settings),
    )  # fmt: skip
    return (
        dx,
        dweight,
        dbias,
        absent(x) if dresidual is None else dresidual,
        absent(mean) if l1 is None else l1,
    )


def batch_norm_act_double_backward(
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
    q_min: int,
    q_max: int,
    training: bool,
    activation: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight`` for the cotangents of the five results of the backward."""
    masked_residual = with_residual and is_masked(activation, scale)
    if not x.numel() or (d_dresidual is not None and not masked_residual):
        return reference.batch_norm_act_double_backward(
            d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd,
            scale, zero_point, q_min, q_max, training, activation, with_residual,
        )  # fmt: skip
    x = dense(x)
    settings = settings_of_batch_norm_act(
        x, training, 0.0, activation, with_residual, None if scale is None else (q_min, q_max)
    )
    v = torch.zeros_like(x) if d_dx is None else beside(d_dx, x)
    u = None if d_dresidual is None else beside(d_dresidual, x)
    d_dy, d_x, d_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mean)
    cotangents = {"d_dweight": d_dweight, "d_dbias": d_dbias, "d_l1": d_l1}
    channels = {"weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    run(
        "batch_norm_act_double_backward", x, settings,
        d_dx=v, d_dresidual=u, **_vectors(x, **cotangents, **channels, scale=scale, zero_point=zero_point),
        dy=beside(dy, x), x=x, activated=_mask_source(activated, x, masked_residual),
        d_dy=d_dy, d_x=d_x, d_weight=d_weight, scratch=scratch(x, settings),
    )  # fmt: skip
    return d_dy, d_x, d_weight


def _mask_source(activated: Tensor | None, x: Tensor, masked_residual: bool) -> Tensor | None:
    """Return the output of the activation if the mask cannot be recomputed from ``x``."""
    return beside(activated, x) if activated is not None and masked_residual else None


def settings_of_batch_norm_act(
    x: Tensor,
    training: bool,
    eps: float,
    activation: str,
    with_residual: bool,
    codes: tuple[int, int] | None,
    with_ends: bool = False,
) -> Settings:
    """Return the settings of every pass; ``codes`` are those of the quantizer, None without one."""
    code_min, code_max = codes or (0, 0)
    return settings_of(
        x, 1, training=training, eps=eps, activation=ACTIVATIONS[activation], with_residual=with_residual,
        quantized=codes is not None, code_min=code_min, code_max=code_max, with_ends=with_ends,
    )  # fmt: skip


def _vectors(x: Tensor, **vectors: Tensor | None) -> dict[str, Tensor | None]:
    """Return per-channel values and scalars in the type of the sums."""
    return {name: vector(v, x) for name, v in vectors.items()}
