"""The convolutions of ``bench ops``: the layer shapes of ResNet-18, ResNet-50 and MobileNetV2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.sweeps import Sweep, bilinear, random

__all__ = ["convolutions"]

# Network, channels in and out, kernel, stride, groups, height and width of the image that comes in.
_CONVOLUTIONS: list[tuple[str, int, int, int, int, int, int]] = [
    ("ResNet stem", 3, 64, 7, 2, 1, 224),
    ("ResNet-18", 64, 64, 3, 1, 1, 56),
    ("ResNet-18", 64, 128, 3, 2, 1, 56),
    ("ResNet-18", 128, 128, 3, 1, 1, 28),
    ("ResNet-18", 128, 256, 3, 2, 1, 28),
    ("ResNet-18", 256, 256, 3, 1, 1, 14),
    ("ResNet-18", 256, 512, 3, 2, 1, 14),
    ("ResNet-18", 512, 512, 3, 1, 1, 7),
    ("ResNet-18 shortcut", 64, 128, 1, 2, 1, 56),
    ("ResNet-50", 256, 64, 1, 1, 1, 56),
    ("ResNet-50", 64, 256, 1, 1, 1, 56),
    ("ResNet-50", 512, 128, 1, 1, 1, 28),
    ("ResNet-50", 1024, 256, 1, 1, 1, 14),
    ("ResNet-50", 512, 2048, 1, 1, 1, 7),
    ("MobileNetV2 stem", 3, 32, 3, 2, 1, 224),
    ("MobileNetV2", 32, 32, 3, 1, 32, 112),
    ("MobileNetV2", 96, 96, 3, 2, 96, 112),
    ("MobileNetV2", 144, 144, 3, 1, 144, 56),
    ("MobileNetV2", 24, 144, 1, 1, 1, 56),
    ("MobileNetV2", 384, 384, 3, 1, 384, 14),
    ("MobileNetV2", 384, 64, 1, 1, 1, 14),
    ("MobileNetV2", 960, 960, 3, 1, 960, 7),
]


def convolutions(device: str, dtype: str, layout: str, smoke: bool) -> list[Sweep]:
    """Return each sweep of one convolution, and the double backward of each layer shape."""
    shapes = [("3 × 3", 4, 6, 3, 2, 1, 8), ("depthwise", 4, 4, 3, 1, 4, 8)] if smoke else _CONVOLUTIONS
    batch = 2 if device == "cpu" else 64
    found: list[Sweep] = []
    for place, shape in enumerate(shapes):
        found += _convolution(shape, batch, device, dtype, layout, orders=(0, 1, 2) if place == 1 else (2,))
    return [*found, *_transposed(device, dtype, layout, smoke)]


def _convolution(
    shape: tuple[str, int, int, int, int, int, int],
    batch: int,
    device: str,
    dtype: str,
    layout: str,
    orders: Sequence[int],
) -> Iterator[Sweep]:
    name, c_in, c_out, kernel, stride, groups, size = shape
    x, v = (random((batch, c_in, size, size), device, dtype, layout) for _ in range(2))
    fan_in = c_in // groups * kernel**2
    filters = (c_out, c_in // groups, kernel, kernel)
    weight, w = (random(filters, device, dtype, layout) / fan_in**0.5 for _ in range(2))
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    forward = partial(F.conv2d, stride=stride, padding=kernel // 2, groups=groups)
    dy = torch.randn_like(forward(x, weight))
    kind = f", {groups} groups" if groups > 1 else ""
    words = (
        f"{name}: {batch} × {c_in} × {size} × {size} to {c_out}, {kernel} × {kernel}, stride {stride}{kind}"
    )
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("conv_forward", (x, weight, None, *geometry), "forward"),
        ("conv_backward", (dy, x, weight, *geometry, [True, True]), "backward"),
        ("conv_double_backward", (v, w, dy, x, weight, *geometry, [True] * 3), "double backward"),
    ]
    make = partial(Sweep, "conv", size=words, passes=0)
    for order in orders:
        yield make(*cases[order], plain=partial(bilinear, forward, x, weight, dy, v, w, order))


def _transposed(device: str, dtype: str, layout: str, smoke: bool) -> Iterator[Sweep]:
    """Yield each sweep of a transposed convolution of a decoder: twice the size, half the channels."""
    batch, c_in, size = (2, 4, 8) if smoke else (2 if device == "cpu" else 64, 256, 28)
    c_out = c_in // 2
    x, v = (random((batch, c_in, size, size), device, dtype, layout) for _ in range(2))
    weight, w = (random((c_in, c_out, 2, 2), device, dtype, layout) / c_in**0.5 for _ in range(2))
    geometry = ([2, 2], [0, 0], [1, 1], [0, 0], 1)
    forward = partial(F.conv_transpose2d, stride=2)
    dy = torch.randn_like(forward(x, weight))
    words = f"decoder: {batch} × {c_in} × {size} × {size} to {c_out}, 2 × 2, stride 2"
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("conv_transpose_forward", (x, weight, None, *geometry), "forward"),
        ("conv_transpose_backward", (dy, x, weight, *geometry, [True, True]), "backward"),
        ("conv_transpose_double_backward", (v, w, dy, x, weight, *geometry, [True] * 3), "double backward"),
    ]
    make = partial(Sweep, "conv_transpose", size=words, passes=0)
    for order, case in enumerate(cases):
        yield make(*case, plain=partial(bilinear, forward, x, weight, dy, v, w, order))
