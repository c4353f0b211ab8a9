"""Checks of arguments: one fact each, an error that names the argument and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_BITS = 16
ACTIVATIONS = ("none", "relu", "relu6")


def some(names: Iterable[object]) -> str:
    """Return the first of any number of names, in order, and how many more there are, for a message."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(f"{name:.100}" for name in ordered[:5]) + more


def number(name: str, value: object) -> float:
    """Return what a user's function gave as a float.

    Raises:
        TypeError: it is not a single number; the message begins with ``name``.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several values
        raise TypeError(f"{name} must return one number, got {value!r:.100}") from error


def probe(op: str, x: Tensor, value: Tensor | None) -> None:
    """Check that a probe is a scalar on the device of ``x``."""
    if value is None:
        return
    if value.dim():
        raise ValueError(f"{op}: probe must be a scalar tensor, got shape {tuple(value.shape)}")
    one_device(op, (x, value))
    floating(op, (x, value))


def one_device(op: str, tensors: Sequence[Tensor | None]) -> None:
    """Check that there is a tensor and that all of them are on one device."""
    present = [t for t in tensors if t is not None]
    if not present:
        raise ValueError(f"{op}: needs at least one tensor, got none")
    device = present[0].device
    if any(t.device != device for t in present):
        names = sorted({str(t.device) for t in present})
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(names)}")


def floating(op: str, tensors: Sequence[Tensor | None]) -> None:
    """Check that every tensor has a floating type: a complex gradient would need conjugates."""
    for t in tensors:
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{op}: every tensor must have a floating type, got {t.dtype}")


def bits(value: object, name: str) -> None:
    """Check a bit width: an int from 1 to 16."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int from 1 to {MAX_BITS}, got {value!r}")
    if not 1 <= value <= MAX_BITS:
        raise ValueError(f"{name} must be from 1 to {MAX_BITS}, got {value}")


def grid(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor, codes: tuple[int, int], axis: int | None
) -> int | None:
    """Check that a quantization grid fits ``x``; return the channel axis, counted from the front."""
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {value!r}")
    one_device(op, (x, scale, zero_point))
    floating(op, (x, scale, zero_point))
    if scale.requires_grad or zero_point.requires_grad:
        raise ValueError(f"{op}: scale and zero_point receive no gradient here; detach them")
    if not 0 <= codes[1] - codes[0] < 2**MAX_BITS:
        raise ValueError(f"{op}: q_max - q_min must be from 0 to {2**MAX_BITS - 1}, got codes {codes}")
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise ValueError(f"{op}: axis {axis} is out of range for x of shape {tuple(x.shape)}")
    channels = 1 if axis is None else x.shape[axis]
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value.numel() != channels:
            raise ValueError(f"{op}: {name} must have {channels} value(s) here, got {tuple(value.shape)}")
    return axis if axis is None else axis % x.dim()


def autocast_is_on(device: str) -> bool:
    """Return whether autocast is on for a type of device; PyTorch knows none for the meta device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def operands(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check that the operands are on one device; return them in autocast's type where that is on."""
    one_device(op, (x, weight, bias))
    floating(op, (x, weight, bias))
    device = x.device.type
    if autocast_is_on(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


def is_traced_by_make_fx() -> bool:
    """Return whether make_fx is recording, which would not see what is computed beside the dispatcher."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def conv_dimensions(op: str, x: Tensor, weight: Tensor) -> int:
    """Return the number of dimensions of space, after checking it."""
    n = weight.dim() - 2
    if n not in (1, 2, 3):
        raise ValueError(f"{op}: weight must have 3, 4 or 5 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (n + 1, n + 2):
        raise ValueError(
            f"{op}: a weight of {n + 2} dimensions takes an input of {n + 2}, or {n + 1} without a batch; "
            f"got shape {tuple(x.shape)}"
        )
    return n


def tuple_of(op: str, name: str, value: int | Sequence[int], n: int) -> list[int]:
    """Return ``value`` as one number for each of ``n`` dimensions."""
    values = [value] * n if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= n
    if len(values) != n:
        raise ValueError(f"{op}: {name} must be one number or {n} of them, got {value!r}")
    return values


def pad(
    x: Tensor, weight: Tensor, padding: int | Sequence[int] | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Return ``x``, padded where the two sides differ, and the padding left to the convolution."""
    n = len(stride)
    if not isinstance(padding, str):
        return x, tuple_of("conv", "padding", padding, n)
    if padding == "valid":
        return x, [0] * n
    if padding != "same":
        raise ValueError(f"conv: padding must be numbers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError(f"conv: padding 'same' needs stride 1, got {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        # PyTorch puts the odd element at the end of a dimension.
        odd = [side for t in reversed(total) for side in (0, t % 2)]
        x = torch.nn.functional.pad(x, odd)
    return x, [t // 2 for t in total]


def normalisation(x: Tensor, vectors: Sequence[Tensor | None], training: bool, activation: str) -> None:
    """Check the arguments of ``batch_norm_act``; the batch size as PyTorch checks it."""
    one_device("batch_norm_act", (x, *vectors))
    floating("batch_norm_act", (x, *vectors))
    if x.dim() < 2:
        raise ValueError(f"batch_norm_act: x must have shape (N, C, *size), got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm_act: activation must be 'none', 'relu' or 'relu6', got {activation!r}")
    if (vectors[0] is None) != (vectors[1] is None):
        raise ValueError("batch_norm_act: give both running_mean and running_var, or neither")
    if training:
        torch.nn.functional._verify_batch_size(x.size())  # type: ignore[attr-defined]
    elif vectors[0] is None or vectors[1] is None:
        raise ValueError("batch_norm_act: evaluation needs running_mean and running_var")
    names = ("running_mean", "running_var", "weight", "bias")
    for name, value in zip(names, vectors, strict=False):
        if value is not None and value.shape != (x.shape[1],):
            raise ValueError(
                f"batch_norm_act: {name} must have shape ({x.shape[1]},) for x of shape {tuple(x.shape)}, "
                f"got {tuple(value.shape)}"
            )


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return the value, after checking that it is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def coefficient(name: str, value: object) -> float:
    """Return a coefficient, after checking that it is a finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and 0 or more, got {value}")
    return float(value)


def count(name: str, value: object, smallest: int = 1) -> int:
    """Return a count, after checking that it is an int from ``smallest`` up."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < smallest:
        raise ValueError(f"{name} must be {smallest} or more, got {value}")
    return value
