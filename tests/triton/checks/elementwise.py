"""Tap, fake quantization and l1 norms against the reference, on the fixture ``device``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.layouts import LAYOUTS
from tests.triton.checks.agreement import DTYPES, both, close, same_bits
from tests.triton.checks.memory import blocks, poisoned_memory  # noqa: F401  fixtures

SHAPES = [(), (1,), (129,), (3, 5), (2, 3, 7, 5), (2, 3, 2, 3, 2), (0, 3), (1025,)]
EDGES = [0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
LAYOUT_NAMES = ["contiguous", *LAYOUTS]


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
) -> Tensor:
    """Return random values, one in eight of them 0."""
    x = torch.randn(shape)
    x = torch.where(torch.rand(shape) < 0.125, 0, x).to(device, dtype)
    return LAYOUTS[layout](x) if layout in LAYOUTS and x.numel() else x


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device, dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tap(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, blocks: str) -> None:  # noqa: F811
    dy, d_dx = normal(shape, dtype, device), normal(shape, dtype, device)
    close("tap_backward", dy)
    for incoming in (None, d_dx):
        for d_l1 in (None, scalar(0.3, dtype, device)):
            same_bits("tap_double_backward", incoming, d_l1, dy)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("other", LAYOUT_NAMES)
def test_layouts(layout: str, other: str, device: torch.device) -> None:
    dy = normal((2, 3, 4, 5), torch.float32, device, layout)
    v = normal((2, 3, 4, 5), torch.float32, device, other)
    one, s, z = (scalar(c, torch.float32, device) for c in (1, 0.25, 2))
    close("tap_backward", dy)
    same_bits("tap_double_backward", v, one, dy)
    for axis in (None, 1, 3):
        grid = (
            (s, z)
            if axis is None
            else (torch.rand(v.shape[axis], device=device) + 0.1, z.expand(v.shape[axis]))
        )
        same_bits("fake_quantize_forward", v, *grid, 0, 7, axis)
        close("fake_quantize_backward", dy, v, *grid, 0, 7, axis, True)
        same_bits("fake_quantize_double_backward", v, one, dy, dy, *grid, 0, 7, axis)
    close("l1_norm_forward", [dy, v])
    same_bits("l1_norm_backward", torch.tensor([0.5, -2], device=device), [dy, v])
    close("l1_norm_double_backward", [v, dy], [dy, v])


def test_nan_and_infinities(device: torch.device) -> None:
    x = torch.tensor([*EDGES, 1.0, -2.0], device=device)
    one, s, z = (scalar(c, torch.float32, device) for c in (1, 0.25, 2))
    for d_l1 in (one, one * float("inf"), one * float("nan")):
        same_bits("tap_double_backward", x.flip(0), d_l1, x)
        same_bits("fake_quantize_double_backward", x.flip(0), d_l1, x, x, s, z, 0, 7, None)
    close("tap_backward", x)
    same_bits("fake_quantize_forward", x, s, z, 0, 7, None)
    same_bits("fake_quantize_backward", x.flip(0), x, s, z, 0, 7, None, False)
    close("l1_norm_forward", [x, x[:4]])
    same_bits("l1_norm_backward", torch.stack([one, one * float("inf")]), [x, x])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 1.1754943508222875e-38])
def test_codes_of_every_number_of_half_precision(
    scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    s = scalar(scale, dtype, device)
    same_bits("fake_quantize_forward", x, s, s * 0, -(2**15) + 1, 2**15 - 1, None)
    same_bits("fake_quantize_forward", x, s, s * 0 + 3, 0, 15, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_at_and_around_ties(dtype: torch.dtype, device: torch.device) -> None:
    ties = torch.arange(-3000, 3000, dtype=dtype, device=device) / 2
    large = torch.tensor(
        [1.0, 2**22 + 0.5, 2**23 - 0.5, 2**23 + 1, 2**31, 2**52 - 0.5, 2**53 + 2], device=device
    )
    for scale in (1.0, 0.1, 0.3, 7e-3):
        s = scalar(scale, dtype, device)
        x = torch.cat([ties, large.to(dtype), -large.to(dtype)]) * s
        x = torch.cat([x, x.nextafter(x * 2), x.nextafter(x * 0)])
        same_bits("fake_quantize_forward", x, s, s * 0, -(2**15) + 1, 2**15 - 1, None)
        same_bits("fake_quantize_backward", x, x, s, s * 0, -7, 7, None, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_fake_quantize(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, blocks: str) -> None:  # noqa: F811
    x, dy, v = (normal(shape, dtype, device) for _ in range(3))
    one = scalar(1, dtype, device)
    for axis in (None, 0, 1, len(shape) - 1):
        channels = () if axis is None else (shape[axis],)
        s = 0.1 + torch.rand(channels, device=device, dtype=one.dtype)
        z = torch.randint(0, 3, channels, device=device).to(one.dtype)
        same_bits("fake_quantize_forward", x, s, z, 0, 7, axis)
        close("fake_quantize_backward", dy, x, s, z, 0, 7, axis, True)
        same_bits("fake_quantize_backward", dy, x, s, z, 0, 7, axis, False)
        for d_dx in (None, v):
            for d_l1 in (None, one * 0.3):
                same_bits("fake_quantize_double_backward", d_dx, d_l1, dy, x, s, z, 0, 7, axis)


def test_l1_norm_of_many(device: torch.device, blocks: str) -> None:  # noqa: F811
    sizes = [(), (0,), (3, 5), (129,), (2, 3, 4, 5), (1,), (1025,), (64,), (0, 4)]
    for dtypes in ([torch.float32], [torch.bfloat16, torch.float32], DTYPES):
        tensors = [normal(s, dtypes[i % len(dtypes)], device) for i, s in enumerate(sizes)]
        close("l1_norm_forward", tensors, tolerance=1e-5)
        dy = both("l1_norm_forward", tensors)[0][1]
        same_bits("l1_norm_backward", dy, tensors)
        close("l1_norm_double_backward", [torch.randn_like(t) for t in tensors], tensors, tolerance=1e-5)
    close("l1_norm_forward", [torch.ones(0, device=device)])


def test_l1_norm_of_addresses_that_are_not_aligned(device: torch.device) -> None:
    line = torch.randn(20_000, device=device)
    tensors = [line[1:9000], line[9001:], line[3:4]]
    close("l1_norm_forward", tensors)
    same_bits("l1_norm_backward", torch.ones(3, device=device), tensors)
    close("l1_norm_double_backward", tensors, tensors)


def test_more_partial_sums_than_one_tile_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradl1_fast.backends.triton._launch.BLOCK", 16)
    close("tap_backward", torch.rand(16 * 1100 + 1, device=device))
