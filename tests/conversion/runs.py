"""Creates a model, runs it, and compares ordinary and penalised steps of two models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gradl1_fast as gl
from gradl1_fast.nn.foreign import is_conv1d_of_transformers
from tests import oracle
from tests.gradients import assert_gradients

LAMBDAS = 0.3, 0.2
_LAYERS = nn.modules.conv._ConvNd, nn.Linear
Loss = Callable[[nn.Module], Tensor]


def images() -> Tensor:
    return torch.randn(4, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def copied(model: nn.Module) -> nn.Module:
    """Return a copy, also of a model with weights that a hook computes, which deepcopy refuses."""
    for module in model.modules():
        weight = vars(module).get("weight")
        if isinstance(weight, Tensor):
            module.weight = weight.detach()
    return copy.deepcopy(model)


def built(make: Callable[[], nn.Module], training: bool = True) -> nn.Module:
    torch.manual_seed(5)
    return make().double().train(training)


def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Return the output, the gradients of all parameters, and the buffers after one pass."""
    torch.manual_seed(7)
    y = model(x.clone())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(y.sin().sum(), parameters, allow_unused=True)
    return [y, *without_noise(gradients), *states(model)]


def states(model: nn.Module) -> list[Tensor]:
    """Return copies of the buffers in the state dict."""
    return [value.clone() for value in model.state_dict().values() if not value.requires_grad]


def without_noise(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return zeros for a gradient that is rounding alone, such as that of a bias before a batch norm."""
    largest = max(float(g.abs().max()) for g in gradients if g is not None)
    return [g if g is None or g.abs().max() > 1e-12 * largest else torch.zeros_like(g) for g in gradients]


def assert_equal_runs(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    original = copied(model)  # the two share their buffers
    assert_gradients(run(other, x), run(original, x), 1e-12)


@dataclass(frozen=True)
class loss_of:  # noqa: N801  # called as a function
    """A loss of one batch, with the same random numbers in every call."""

    batch: Tensor

    def __call__(self, model: nn.Module) -> Tensor:
        torch.manual_seed(7)
        return model(self.batch).sin().sum()


def _called(model: nn.Module, loss: Loss) -> tuple[list[str], list[str]]:
    """Return the weights that a pass through a plain model uses, and the layers whose input is quantized.

    A weight counts if it gets a gradient; a tied one has the name of the first layer in the tree.
    """
    model, read = copied(model), set[str]()
    for name, module in model.named_modules():
        if isinstance(module, (*_LAYERS, nn.Embedding)) or is_conv1d_of_transformers(module):
            module.register_forward_pre_hook(lambda *_, name=name: read.add(name))
    with parametrize.cached():
        value = loss(model)
        weights: dict[int, tuple[str, Tensor]] = {}
        for name in (name for name, _ in model.named_modules() if name in read):
            weight = model.get_submodule(name).weight
            if weight.requires_grad:
                weights.setdefault(id(weight), (f"{name}.weight", weight))
        tensors = [weight for _, weight in weights.values()]
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    used = [n for (n, _), g in zip(weights.values(), gradients, strict=True) if g is not None]
    modules = [(name, m) for name, m in model.named_modules() if name in read]
    return used, [name for name, m in modules if not isinstance(m, nn.Embedding)]


def truth(model: nn.Module, loss: Loss, scale: str = "none") -> oracle.Penalised:
    """Return what ordinary double backprop says of a penalised step of a plain model."""
    weights, layers = _called(model, loss)
    data = getattr(loss, "batch", None)
    return oracle.penalised_gradients(
        lambda: oracle.measure(model, loss, weights=weights, inputs_of=layers, data=data),
        _trainable(model),
        lambda_w=LAMBDAS[0],
        lambda_a=LAMBDAS[1],
        scale=scale,
    )


def penalised(model: nn.Module, loss: Loss, scale: str = "none") -> oracle.Penalised:
    """Return the same of a converted model."""
    penalty = gl.GradL1(model, *LAMBDAS, scale=scale)
    value = loss(model)
    extra = penalty(value)
    parameters = _trainable(model)
    total = torch.autograd.grad(
        value + extra, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    terms = {name.removesuffix(".input"): term for name, term in penalty.terms.items()}
    return oracle.Penalised(value.detach(), extra.detach(), terms, dict(zip(parameters, total, strict=True)))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_steps(
    plain: nn.Module,
    converted: nn.Module,
    loss: Loss,
    *,
    scale: str = "none",
    steps: int = 2,
    rtol: float = 1e-9,
) -> None:
    """Compare penalised steps with ordinary double backprop: the second runs plans that the first has proved.

    Args:
        plain: shares nothing with ``converted``.
        converted: a converted model.
        loss: a pass and its loss; its ``batch`` is the input of the network, which no term counts.
        scale: of the penalty.
        steps: how many.
        rtol: of each gradient's largest element.
    """
    for _ in range(steps):
        theirs, ours = truth(plain, loss, scale), penalised(converted, loss, scale)
        assert_same(ours, theirs, rtol, terms=scale == "none")
        assert_gradients(states(converted), states(plain), rtol)


def assert_same(
    ours: oracle.Penalised, theirs: oracle.Penalised, rtol: float = 1e-9, *, terms: bool = True
) -> None:
    """Compare loss, penalty and gradients of two penalised steps, and the terms."""
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=0)
    for name, term in _added(theirs.terms).items() if terms else ():
        torch.testing.assert_close(ours.terms.get(name, torch.zeros_like(term)), term, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(ours.penalty, theirs.penalty, rtol=rtol, atol=0)
    gradients = (without_noise(tuple(result.gradients.values())) for result in (ours, theirs))
    assert_gradients(*gradients, rtol)


def _added(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the terms by layer: one that is called several times has one site."""
    result: dict[str, Tensor] = {}
    for name, term in terms.items():
        layer = name.split(" #")[0]
        result[layer] = result.get(layer, torch.zeros_like(term)) + term
    return result
