"""Conversion between weights and their codes."""

from __future__ import annotations

from torch import Tensor

__all__ = ["along", "codes", "values"]


def along(of_channels: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return a scalar, or one value per channel along ``axis``, in a shape that broadcasts against ``x``."""
    return (
        of_channels if axis is None else of_channels.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    )


def codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, ends: tuple[int, int], axis: int | None = None
) -> Tensor:
    """Return the codes of a tensor as whole numbers in float, rounded and clamped as in fake quantization."""
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    return ((x / scale).round() + zero_point).clamp(*ends)


def values(codes: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """Return the values of codes around zero, in the type of ``scale``."""
    return codes.to(scale.dtype) * along(scale, codes, axis)
