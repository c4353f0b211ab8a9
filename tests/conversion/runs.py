"""A model made anew, one pass through it, and the comparison of two."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.gradients import assert_gradients


def images() -> Tensor:
    return torch.randn(4, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def built(make: Callable[[], nn.Module], training: bool = True) -> nn.Module:
    torch.manual_seed(5)
    return make().double().train(training)


def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Return the output, the gradients of all parameters, and the buffers after one pass."""
    torch.manual_seed(7)
    y = model(x.clone())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(y.sin().sum(), parameters, allow_unused=True)
    return [
        y,
        *without_noise(gradients),
        *(b.clone() for b in model.state_dict().values() if not b.requires_grad),
    ]


def without_noise(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return zeros for a gradient that is rounding alone, such as that of a bias before a batch norm."""
    largest = max(float(g.abs().max()) for g in gradients if g is not None)
    return [g if g is None or g.abs().max() > 1e-14 * largest else torch.zeros_like(g) for g in gradients]


def assert_equal_runs(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    original = copy.deepcopy(model)  # the two share their buffers
    assert_gradients(run(other, x), run(original, x), 1e-12)
