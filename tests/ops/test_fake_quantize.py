from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradl1_fast import functional as ours
from tests.ops.sweeps import leaf

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_type = pytest.mark.parametrize("dtype", FLOATS, ids=str)
pytestmark = pytest.mark.usefixtures("each_cpu_backend")
NAN, INF = float("nan"), float("inf")


def quantize(
    x: Tensor, scale: float, zero: float, codes: tuple[int, int], per_channel: bool = False, **probe: Tensor
) -> Tensor:
    shape, axis = ((x.shape[0],), 0) if per_channel else ((), None)
    dtype = torch.promote_types(x.dtype, torch.float32)
    s, z = (torch.full(shape, v, dtype=dtype) for v in (scale, zero))
    return ours.fake_quantize(x, s, z, *codes, axis=axis, **probe)


@each_type
@pytest.mark.parametrize("per_channel", [False, True])
def test_ties_round_to_even(dtype: torch.dtype, per_channel: bool) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.75], dtype=dtype) / 4
    expected = torch.tensor([-2, -2, 0, 0, 2, 2, 1], dtype=dtype) / 4
    assert torch.equal(quantize(x, 0.25, 0, (-7, 7), per_channel), expected)


@each_type
@pytest.mark.parametrize("per_channel", [False, True])
def test_nan_propagates_and_infinities_clamp(dtype: torch.dtype, per_channel: bool) -> None:
    x = torch.tensor([NAN, INF, -INF, 0.0, 100.0], dtype=dtype)
    expected = torch.tensor([NAN, 2.5, -1.0, 0.0, 2.5], dtype=dtype)
    actual = quantize(x, 0.5, 2, (0, 7), per_channel)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_quotients_beyond_every_integer_clamp(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    x = torch.tensor([finfo.max, -finfo.max, 1e15, -1e15], dtype=dtype)
    expected = torch.tensor([4, -3, 4, -3], dtype=dtype) * finfo.tiny
    assert torch.equal(quantize(x, finfo.tiny, 3, (0, 7)), expected)


def test_gradient_passes_where_the_code_was_not_clamped() -> None:
    # Codes 0..3, zero point 1, step 1: values round into the grid between -1.5 and 2.5.
    x = leaf(torch.tensor([-1.75, -1.5, -1.25, 2.25, 2.5, 2.75, NAN, INF]).double())
    gradient = torch.autograd.grad(quantize(x, 1, 1, (0, 3)).sum(), x)[0]
    assert gradient.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_probe_measures_the_gradient_before_the_mask() -> None:
    x, probe = leaf(torch.tensor([-9.0, 0.2, 9.0])), leaf(torch.zeros(()))
    y = quantize(x, 1, 0, (-3, 3), probe=probe)
    dy = torch.tensor([1.0, -2.0, 4.0])
    l1, dx = torch.autograd.grad(y, (probe, x), dy, create_graph=True)
    assert (l1.item(), dx.tolist()) == (7, [0, -2, 0])


def test_an_ordinary_backward_pass_gives_the_probe_no_gradient() -> None:
    x, probe = leaf(torch.ones(3)), leaf(torch.zeros(()))
    quantize(x, 1, 0, (-3, 3), probe=probe).sum().backward()
    assert probe.grad is None
    assert x.grad is not None


def test_per_channel_uses_each_channels_own_grid() -> None:
    x = torch.full((2, 3, 2), 0.9, dtype=torch.float64)
    scale, zero = torch.tensor([1.0, 0.5, 0.2]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    actual = ours.fake_quantize(x, scale, zero, 0, 3, axis=-2)
    assert actual[1, :, 0].tolist() == pytest.approx([1.0, 1.0, 0.2])
