"""Batch norm with residual and activation against the reference, on the fixture ``device``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gradl1_fast.backends import triton
from tests.compiled.calls import NO_GRID
from tests.compiled.folded import assert_folds
from tests.ops.layouts import LAYOUTS
from tests.triton.checks.agreement import DTYPES, close
from tests.triton.checks.memory import blocks, poisoned_memory  # noqa: F401  fixtures

SHAPES = [
    (3, 4, 3, 2),
    (2, 9, 5, 1),
    (6, 3),
    (4, 3, 5),
    (2, 2, 2, 3, 2),
    (5, 1, 9, 13),
    (3, 9, 1, 1),
    (0, 3, 2, 2),
]
KINDS = [(t, a, r) for t in (True, False) for a in ("none", "relu", "relu6") for r in (False, True)]


def sweeps(
    x: Tensor,
    training: bool,
    activation: str,
    residual: Tensor | None = None,
    *,
    affine: bool = True,
    dy: Tensor | None = None,
    v: Tensor | None = None,
    absent: tuple[int, ...] = (),
) -> None:
    """Check all three sweeps; ``absent`` are the numbers of cotangents that do not arrive."""
    vector = torch.promote_types(x.dtype, torch.float32)
    a, b, c, d = (torch.randn(x.shape[1], device=x.device, dtype=vector) for _ in range(4))
    weight, bias = (a, b) if affine else (None, None)
    forward = (x, weight, bias, c, d.abs() + 0.1, residual, *NO_GRID, training, 1e-5, activation)
    close("batch_norm_act_forward", *forward)
    y, _, mean, rstd = triton.batch_norm_act_forward(*forward)
    dy = torch.randn_like(x) if dy is None else dy
    saved = (dy, x, None if activation == "none" else y, weight, bias, mean, rstd)
    saved = (*saved, *NO_GRID, training, activation)
    has_residual = residual is not None
    for with_l1 in (False, True):
        close("batch_norm_act_backward", *saved, has_residual, with_l1)
    d_dresidual = torch.randn_like(x) if has_residual and activation != "none" else None
    cotangents = [torch.randn_like(x) if v is None else v, c, d, d_dresidual, d[0] if x.shape[1] else None]
    cotangents = [None if i in absent else t for i, t in enumerate(cotangents)]
    close("batch_norm_act_double_backward", *cotangents, *saved, has_residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(shape: tuple[int, ...], layout: str, device: torch.device, blocks: str) -> None:  # noqa: F811
    x, residual = (torch.randn(shape, device=device) for _ in range(2))
    if layout == "channels_last":
        x = LAYOUTS[layout](x)
    sweeps(x, True, "relu")
    sweeps(x, True, "relu6", residual)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for i, k in enumerate(KINDS) for j, d in enumerate(DTYPES) if (i + j) % 2],
    ids=str,
)
def test_kinds(kind: tuple[bool, str, bool], dtype: torch.dtype, device: torch.device) -> None:
    training, activation, with_residual = kind
    x, residual = (3 * torch.randn(3, 4, 5, 3, device=device, dtype=dtype) for _ in range(2))
    sweeps(x, training, activation, residual if with_residual else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_copied(layout: str, device: torch.device) -> None:
    x, dy, v, residual = (torch.randn(3, 4, 5, 2, device=device) for _ in range(4))
    change = LAYOUTS[layout]
    sweeps(x, True, "relu", change(residual), dy=change(dy), v=v if layout == "constant" else change(v))
    if layout not in ("expanded", "constant"):
        sweeps(change(x), True, "relu", residual, dy=dy, v=change(v))


def test_more_channels_than_a_strip_holds(device: torch.device) -> None:
    sweeps(LAYOUTS["channels_last"](torch.randn(2, 70, 3, 2, device=device)), True, "relu")
    sweeps(torch.randn(5, 70, device=device), True, "relu")


@pytest.mark.parametrize(
    "absent", [s for n in range(1, 6) for s in itertools.combinations(range(5), n)][::6], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_cotangents_that_do_not_arrive(absent: tuple[int, ...], training: bool, device: torch.device) -> None:
    x, residual = (torch.randn(3, 4, 5, device=device) for _ in range(2))
    sweeps(x, training, "relu", residual, absent=absent, affine=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, LAYOUTS["channels_last"]])
def test_quantization_folds_in_bit_for_bit(dtype: torch.dtype, layout: Any, device: torch.device) -> None:
    assert_folds(triton, (3, 5, 4, 3), dtype, layout, device)


def test_nan_and_infinities_stay_in_their_channel(device: torch.device) -> None:
    x = torch.randn(3, 4, 5, 2, device=device)
    x[1, 0, 2, 1], x[0, 2, 0, 0] = float("nan"), float("inf")
    for layout in (x, LAYOUTS["channels_last"](x)):
        sweeps(layout, True, "relu")
        sweeps(layout, False, "relu6", torch.randn_like(x))


def test_a_large_mean_does_not_drown_the_variance(device: torch.device) -> None:
    x = 1e4 + torch.randn(8, 3, 16, 16, dtype=torch.float64, device=device)
    rest = (*[None] * 5, *NO_GRID, True, 0.0, "none")
    *_, exact, _ = triton.batch_norm_act_forward(x, *rest)
    for layout in (x, LAYOUTS["channels_last"](x)):
        *_, mean, rstd = triton.batch_norm_act_forward(layout.float(), *rest)
        rounded = layout.float().double().var((0, 2, 3), correction=0).rsqrt()
        assert torch.allclose(rstd.double(), rounded, rtol=1e-5, atol=0)
        assert torch.allclose(mean.double(), exact, rtol=1e-6, atol=0)


def test_the_recomputed_mask_is_that_of_the_output(device: torch.device) -> None:
    """Outputs that underflow to 0 in their type, or round to 6, pass no gradient."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(64, 5, 4, device=device).to(dtype)
        bias = torch.tensor([0.0, 3e-8, 6.0, -1e-8, 5.999], device=device)
        weight = torch.tensor([1e-7, 1e-8, 1e-3, 1e-8, 1e-3], device=device)
        head = (x, weight, bias, None, None, None)
        y, _, mean, rstd = triton.batch_norm_act_forward(*head, *NO_GRID, True, 1e-5, "relu6")
        saved = (torch.ones_like(x), x, y, weight, bias, mean, rstd, *NO_GRID, True, "relu6")
        assert torch.equal(
            triton.batch_norm_act_backward(*saved, False, False)[2],
            ((y > 0) & (y < 6)).sum((0, 2)).to(torch.float32),
        )
