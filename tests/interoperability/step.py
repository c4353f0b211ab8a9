"""One small penalised step: its network, its data, and its gradient in plain eager mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl

LAMBDAS = (0.3, 0.2)


def plain_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    layers = (
        *(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU6()),
        *(nn.Flatten(), nn.Linear(12, 3)),
    )
    return nn.Sequential(*layers).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return gl.convert(plain_network(dtype))


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.arange(5) % 3


def loss_of(forward: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = data(dtype)
    return F.cross_entropy(forward(x), y)


def gradients(model: nn.Module, lambda_w: float = LAMBDAS[0], lambda_a: float = LAMBDAS[1]) -> list[Tensor]:
    """Return the gradient of the penalised loss in plain eager mode."""
    penalty = gl.GradL1(model, lambda_w, lambda_a)
    loss = loss_of(model, next(model.parameters()).dtype)
    return list(torch.autograd.grad(loss + penalty(loss), list(model.parameters())))


def assert_penalty_counts(found: list[Tensor], without: list[Tensor]) -> None:
    """Check that a gradient is far from the one without a penalty, for every parameter."""
    for a, b in zip(found, without, strict=True):
        assert (a - b).abs().max() > 1e-3 * a.abs().max()
