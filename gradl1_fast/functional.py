"""The differentiable functions. Everything here can be differentiated exactly twice.

Each function checks its arguments and calls a registered operator. Under
``torch.autograd.grad(..., create_graph=True)`` the "gradient" of a ``probe`` is the l1 norm of the
gradient at the function's output, as a tensor that can be differentiated once more; in an ordinary
backward pass the probe receives nothing. A tensor that has no floating
type (whole numbers, complex ones) is a ``TypeError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast import ops
from gradl1_fast._dtypes import sum_dtype

__all__ = [
    "batch_norm_act",
    "conv",
    "conv_transpose",
    "fake_quantize",
    "l1_norm",
    "linear",
    "quantization_grid",
    "scale_probe",
    "tap",
    "value_range",
]


def tap(x: Tensor, probe: Tensor) -> Tensor:
    """Return ``x`` itself; the probe's gradient is ``sum |dL/dy|``.

    Args:
        x: any shape and floating type.
        probe: a scalar leaf on the device of ``x``. While it does not require a gradient nothing is
            measured, and nothing is paid.

    Returns:
        ``x`` or a view of it; nothing is copied.

    Raises:
        ValueError: the probe is not a scalar or on another device.

    Differentiable twice; ``sign(0) = 0``. Source: section 3 of arXiv 2002.07520 and ``ops/tap.py``.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import tap
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> probe = torch.zeros((), requires_grad=True)
        >>> loss = (tap(x, probe) ** 2).sum()
        >>> norm = torch.autograd.grad(loss, probe, create_graph=True)[0]  # sum |2 x|
        >>> norm.item()
        6.0
        >>> torch.autograd.grad(norm, x)[0]
        tensor([ 2., -2.])
    """
    check.probe("tap", x, probe)
    return ops.tap.tap_forward(x, probe) if torch.is_grad_enabled() and probe.requires_grad else x


def scale_probe(probe: Tensor, scale: Tensor) -> Tensor:
    """Return a probe whose gradient, passed on to ``probe``, is multiplied by ``scale``.

    Args:
        probe: see :func:`tap`.
        scale: a scalar; the double backward differentiates it, the first backward does not.

    Returns:
        A scalar to be used as a probe; ``probe`` then receives ``scale * sum |dL/dy|``.

    Raises:
        ValueError: one of them is not a scalar, or they are on different devices.

    Differentiable once more than the first backward, which is all a penalty needs.
    """
    check.probe("scale_probe", scale, probe)
    check.probe("scale_probe", probe, scale)
    return ops.tap.scale_probe(probe, scale)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    *,
    axis: int | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """Return ``scale * (clamp(rint(x / scale) + zero_point, q_min, q_max) - zero_point)``.

    Rounding is half to even; NaN stays NaN and infinities go to the ends of the range.

    Args:
        x: any shape and floating type; half precision is computed in float32.
        scale: size of a step, in units of ``x``: one value, or one for each channel along ``axis``.
        zero_point: whole numbers in floating point, in the shape of ``scale``.
        q_min: smallest code.
        q_max: largest code, ``0 <= q_max - q_min < 2**16``.
        axis: the channel axis of ``x``; None for one range for the whole tensor.
        probe: see :func:`tap`; it measures the gradient at the *output*, before the mask.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: the grid does not fit ``x``, or ``scale`` requires a gradient, which the
            straight-through estimator does not give.

    Differentiable twice, by the straight-through estimator: the gradient passes unchanged where the
    code was not clamped and is zero elsewhere. Source: ``ops/fake_quantize.py``.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import fake_quantize
        >>> x = torch.tensor([0.24, 0.5, 0.75, 9.0])
        >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 0, 3)  # ties go to the even code
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    check.probe("fake_quantize", x, probe)
    axis = check.grid("fake_quantize", x, scale, zero_point, (q_min, q_max), axis)
    return ops.fake_quantize.fake_quantize_forward(x, scale, zero_point, q_min, q_max, axis, probe)


def l1_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the vector of ``sum |t|``, one entry for each tensor, computed together.

    Args:
        tensors: at least one tensor, of any shapes and floating types, on one device.

    Returns:
        Shape ``(len(tensors),)``; float64 if any tensor is, else float32.

    Raises:
        ValueError: there is no tensor, or they are on different devices.

    Differentiable twice; ``sign(0) = 0``.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import l1_norm
        >>> l1_norm([torch.tensor([1.0, -2.0]), torch.ones(2, 2)])
        tensor([3., 4.])
    """
    check.one_device("l1_norm", tensors)
    check.floating("l1_norm", tensors)
    return ops.l1_norm.l1_norm_forward(list(tensors))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve in 1, 2 or 3 dimensions, as ``torch.nn.functional.conv1d``, ``conv2d``, ``conv3d`` do.

    Args:
        x: ``(N, C_in, *size)`` or, without a batch, ``(C_in, *size)``.
        weight: ``(C_out, C_in / groups, *kernel)``; its dimensions decide between 1d, 2d and 3d.
        bias: ``(C_out,)`` or None.
        stride: one number, or one for each dimension of space.
        padding: one number, one for each dimension of space, ``"same"`` or ``"valid"``.
        dilation: one number, or one for each dimension of space.
        groups: number of groups; ``C_in`` for a depthwise convolution.

    Returns:
        ``(N, C_out, *size_out)``, in the layout that PyTorch's convolution chooses.

    Raises:
        ValueError: dimensions or devices do not match. Other shape errors are PyTorch's own.

    Differentiable twice, with fprop, dgrad and wgrad only. Under autocast it computes in its type.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import conv
        >>> conv(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding="same").shape
        torch.Size([1, 1, 4, 4])
    """
    x, weight, bias = check.operands("conv", x, weight, bias)
    n = check.conv_dimensions("conv", x, weight)
    stride = check.tuple_of("conv", "stride", stride, n)
    dilation = check.tuple_of("conv", "dilation", dilation, n)
    x, padding = check.pad(x, weight, padding, stride, dilation)
    batch = x if x.dim() == n + 2 else x[None]
    y = ops.conv.conv_forward(batch, weight, bias, stride, padding, dilation, groups)
    return y if batch is x else y.squeeze(0)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Apply the transpose of a convolution, as ``torch.nn.functional.conv_transpose2d`` does in 2 dimensions.

    Args:
        x: ``(N, C_in, *size)`` or, without a batch, ``(C_in, *size)``.
        weight: ``(C_in, C_out / groups, *kernel)``; its dimensions decide between 1d, 2d and 3d.
        bias: ``(C_out,)`` or None.
        stride: of the convolution, one number or one for each dimension of space.
        padding: of the convolution, in the same form; the output is that much smaller on each side.
        output_padding: added to one side of the output, in the same form.
        groups: number of groups.
        dilation: in the form of ``stride``.

    Returns:
        ``(N, C_out, *size_out)``, in the layout that PyTorch's transposed convolution chooses.

    Raises:
        ValueError: dimensions or devices do not match. Other shape errors are PyTorch's own.

    Differentiable twice, with fprop, dgrad and wgrad only. Under autocast it computes in its type.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import conv_transpose
        >>> conv_transpose(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2), stride=2).shape
        torch.Size([1, 1, 8, 8])
    """
    op = "conv_transpose"
    x, weight, bias = check.operands(op, x, weight, bias)
    n = check.conv_dimensions(op, x, weight)
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    geometry = [check.tuple_of(op, name, value, n) for name, value in sizes.items()]
    batch = x if x.dim() == n + 2 else x[None]
    y = ops.conv.conv_transpose_forward(batch, weight, bias, *geometry, groups)
    return y if batch is x else y.squeeze(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, as ``torch.nn.functional.linear`` does.

    Args:
        x: ``(*, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.

    Returns:
        ``(*, out)``.

    Raises:
        ValueError: devices do not match. Shape errors are PyTorch's own.

    Differentiable twice. Under autocast it computes in its type.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import linear
        >>> linear(torch.ones(2, 3), torch.ones(1, 3))
        tensor([[3.],
                [3.]])
    """
    x, weight, bias = check.operands("linear", x, weight, bias)
    return ops.linear.linear_forward(x, weight, bias)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "none",
    grid: tuple[Tensor, Tensor, int, int] | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """Return ``q(act(batch_norm(x) + residual))``, as ``torch.nn.functional.batch_norm`` normalises.

    q is :func:`fake_quantize` with a ``grid``, in the same passes over memory; without one it is nothing.

    Args:
        x: ``(N, C, *size)``; an empty one leaves the running statistics as they are.
        running_mean: ``(C,)``, updated in place in training if given; needed in evaluation.
        running_var: as ``running_mean``, with the unbiased variance.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        training: normalise by the batch's statistics rather than by the running ones.
        momentum: share of the batch in the update of the running statistics.
        eps: added to the variance.
        residual: added before the activation; must broadcast to the shape of ``x``.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        grid: ``(scale, zero_point, q_min, q_max)`` for the whole tensor, as :func:`quantization_grid`
            returns it; None to leave the result as it is.
        probe: see :func:`tap`; it measures the gradient at the output, of the quantizer if there is one.

    Returns:
        A tensor like ``x``, in its layout.

    Raises:
        ValueError: an unknown activation, statistics missing in evaluation, different devices, a
            grid that requires a gradient or is not one for the tensor; or a single value per channel
            in training, which is PyTorch's own error.

    Differentiable twice with respect to x, weight, bias, residual; through a quantizer by the
    straight-through estimator. Source:
    ``backends/reference/batch_norm_act.py``.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import batch_norm_act
        >>> x = torch.tensor([[[-1.0, 1.0]]])
        >>> batch_norm_act(x, None, None, training=True, eps=0.0, activation="relu")
        tensor([[[0., 1.]]])
    """
    check.probe("batch_norm_act", x, probe)
    check.normalisation(x, (running_mean, running_var, weight, bias, residual), training, activation)
    if residual is not None:
        residual = residual.expand_as(x).to(x.dtype)
    scale, zero_point, q_min, q_max = grid or (None, None, 0, 0)
    if grid is not None:
        check.grid("batch_norm_act", x, *grid[:2], (q_min, q_max), None)
    y, _, mean, rstd = ops.batch_norm_act.batch_norm_act_forward(
        x, weight, bias, running_mean, running_var, residual, scale, zero_point, q_min, q_max,
        training, eps, activation, probe,
    )  # fmt: skip
    if training and running_mean is not None and x.numel():
        _update_statistics(running_mean, running_var, mean, rstd, momentum, eps, x)
    return y


def value_range(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of ``x``, of each channel along ``axis`` if given.

    In float32, or float64 for float64. Differentiable; a gradient is shared evenly among equal
    extremes. NaN propagates.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import value_range
        >>> value_range(torch.tensor([[1.0, 5.0], [-3.0, 2.0]]), axis=0)
        (tensor([ 1., -3.]), tensor([5., 2.]))
    """
    x = x.to(sum_dtype(x.dtype))
    if axis is not None:
        x = x.transpose(0, axis).flatten(1)
    dims = [] if axis is None else [1]
    return x.amin(dims), x.amax(dims)


def quantization_grid(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor, int, int]:
    """Return the grid that covers a range: ``scale, zero_point, q_min, q_max`` for :func:`fake_quantize`.

    Zero is exactly representable on every grid. A range without width gets the smallest normal
    number as its scale.

    Args:
        low: lower end of the range, one value or one for each channel; ends above 0 count as 0.
        high: upper end; ends below 0 count as 0.
        bits: 1 to 16.
        symmetric: codes around zero, from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1`` (at 1 bit -1
            and 0), and zero point 0. Otherwise codes from 0 to ``2**bits - 1``.

    Returns:
        ``scale`` and ``zero_point`` in the shape of ``low``, and the smallest and largest code.

    Raises:
        TypeError: ``bits`` is not an int.
        ValueError: ``bits`` is out of range.

    The scale is differentiable with respect to the ends of the range.

    Examples:
        >>> import torch
        >>> from gradl1_fast.functional import quantization_grid
        >>> quantization_grid(torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric=False)
        (tensor(1.), tensor(1.), 0, 3)
    """
    check.bits(bits, "bits")
    low, high = low.clamp(max=0), high.clamp(min=0)
    tiny = torch.finfo(low.dtype).tiny
    if symmetric:
        limit = max(2 ** (bits - 1) - 1, 1)
        scale = (torch.maximum(-low, high) / limit).clamp(min=tiny)
        return scale, torch.zeros_like(scale), -limit, limit if bits > 1 else 0
    # Divided before subtracting: the width of the range may overflow where its ends do not.
    scale = (high / (2**bits - 1) - low / (2**bits - 1)).clamp(min=tiny)
    zero_point = (-low.detach() / scale.detach()).round().clamp(0, 2**bits - 1)
    return scale, zero_point, 0, 2**bits - 1


@torch.no_grad()
def _update_statistics(
    running_mean: Tensor,
    running_var: Any,
    mean: Tensor,
    rstd: Tensor,
    momentum: float,
    eps: float,
    x: Tensor,
) -> None:
    count = x.numel() // x.shape[1]
    variance = (rstd.square().reciprocal() - eps).clamp_(min=0) * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(variance.to(running_var.dtype), momentum)
