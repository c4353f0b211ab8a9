"""A network of linear layers with smooth activations, and its double backprop."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests import oracle

Loss = Callable[[nn.Module], Tensor]


def linears(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4), nn.Softplus(), *tail).double()


def data() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def curved(model: nn.Module) -> Tensor:
    return model(data()).square().mean()


def gradients(model: nn.Module, value: Tensor) -> list[Tensor | None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(value, parameters, allow_unused=True))


def truth(
    model: nn.Module,
    weights: Iterable[str],
    inputs_of: Iterable[str] = (),
    *,
    loss: Loss = curved,
    **options: object,
) -> oracle.Penalised:
    """Return what ordinary double backprop gives in a plain network; both lambdas are 1 by default."""
    return oracle.penalised_gradients(
        lambda: oracle.measure(model, loss, weights=weights, inputs_of=inputs_of),
        {name: p for name, p in model.named_parameters() if p.requires_grad},
        **{"lambda_w": 1.0, "lambda_a": 1.0, "scale": "step", **options},
    )


def ours(model: nn.Module, penalty: gl.GradL1, loss: Loss = curved) -> oracle.Penalised:
    """Return the same by a penalty of a converted model."""
    value = loss(model)
    extra = penalty(value)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    total = gradients(model, value + extra)
    return oracle.Penalised(
        value.detach(), extra.detach(), dict(penalty.terms), dict(zip(names, total, strict=True))
    )


def assert_same(actual: oracle.Penalised, expected: oracle.Penalised, rtol: float = 1e-10) -> None:
    """Compare the penalty and the gradient of every parameter, to the digits of the largest gradient."""
    torch.testing.assert_close(actual.penalty, expected.penalty, rtol=rtol, atol=0)
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        found = torch.zeros_like(gradient) if found is None else found
        torch.testing.assert_close(found, gradient, rtol=rtol, atol=1e-2 * rtol * largest)
