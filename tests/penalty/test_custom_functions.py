"""Custom functions: a lost second derivative raises with the name, and a correct one is accepted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl
from tests.gradients import assert_gradients

Formula = Callable[..., Any]


def function(formula: Formula, value: Callable[[Tensor], Tensor] = lambda x: x**3) -> Any:
    """Return a function whose gradient is computed by ``formula(ctx, dy)``."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return value(x)

        backward = staticmethod(formula)

    return Custom


def cubes(ctx: Any, dy: Tensor) -> Tensor:
    return 3 * ctx.saved_tensors[0] ** 2 * dy


def wrapped(formula: Formula) -> Formula:
    return functools.wraps(formula)(lambda *args: formula(*args))


def hidden(formula: Formula) -> Formula:
    return lambda *args: formula(*args)


def scaled(formula: Formula) -> Formula:
    return lambda *args: 1.0 * formula(*args)


def detaching(formula: Formula) -> Formula:
    return lambda *args: formula(*args).detach()


def through_data(formula: Formula) -> Formula:
    return lambda ctx, dy: formula(ctx, dy.data).data


def through_numpy(formula: Formula) -> Formula:
    return lambda *args: torch.from_numpy(formula(*args).detach().numpy().copy())


CASES: dict[str, tuple[Formula, str]] = {
    "once differentiable": (once_differentiable(cubes), r"function.<locals>.Custom is once_differentiable"),
    "in custom_bwd": (custom_bwd(once_differentiable(cubes), device_type="cpu"), "Custom is once_diff"),
    "in functools.wraps": (wrapped(once_differentiable(cubes)), "Custom is once_differentiable"),
    "in two of them": (wrapped(wrapped(once_differentiable(cubes))), "Custom is once_differentiable"),
    "in a lambda": (hidden(once_differentiable(cubes)), "Custom is once_differentiable"),
    "in a lambda, multiplied": (scaled(once_differentiable(cubes)), "Custom is once_differentiable"),
    "no_grad": (torch.no_grad()(cubes), "Custom cuts the graph"),
    "detach": (detaching(cubes), "Custom cuts the graph"),
    "data": (through_data(cubes), "Custom cuts the graph"),
    "numpy": (through_numpy(cubes), "Custom cuts the graph"),
}


class Net(nn.Module):
    """Two layers, with a function between them or behind the last."""

    def __init__(self, middle: Any = torch.tanh, last: Any = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.middle, self.last = middle, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.middle(self.first(x))))


def network(**functions: Any) -> nn.Module:
    return gl.convert(Net(**functions).double())


def data() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def backward(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    total.backward()
    return [p.grad for p in parameters]


def grad(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(total, parameters, allow_unused=True))


def backward_inputs(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    total.backward(inputs=parameters)
    return [p.grad for p in parameters]


def mean(y: Tensor) -> Tensor:
    return y.mean()


def squares(y: Tensor) -> Tensor:
    return y.square().mean()


def step(
    model: nn.Module,
    criterion: Callable[[Tensor], Tensor] = squares,
    way: Callable[..., list[Tensor | None]] = grad,
    lambda_a: float = 0.2,
) -> list[Tensor | None]:
    penalty = gl.GradL1(model, 0.3, lambda_a)
    loss = criterion(model(data()))
    return way(loss + penalty(loss), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("way", [backward, grad, backward_inputs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", ["middle", "last"])
@pytest.mark.parametrize("case", CASES)
def test_a_function_that_would_lose_the_penaltys_gradient_is_named(
    case: str, place: str, way: Callable[..., Any]
) -> None:
    formula, message = CASES[case]
    model = network(**{place: function(formula).apply})
    with pytest.raises(RuntimeError, match=message):
        step(model, mean if place == "last" else squares, way)


def test_the_marked_one_of_several_functions_is_named() -> None:
    marked = function(CASES["in custom_bwd"][0]).apply
    model = network(middle=with_a_buffer, last=marked)
    with pytest.raises(
        RuntimeError, match=r"^tests[\w.]*\.function\.<locals>\.Custom is once_differentiable"
    ):
        step(model)


def test_a_criterion_that_cuts_is_named() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="cuts the graph"):
        step(model, lambda y: function(torch.no_grad()(lambda ctx, dy: dy.expand(5, 2) / 10), mean).apply(y))


def doubled(ctx: Any, dy: Tensor) -> Tensor:
    return 2 * dy


def zeros(ctx: Any, dy: Tensor) -> Tensor:
    return torch.zeros_like(dy)


class Sum(torch.autograd.Function):
    """Sum with a constant and a buffer, of which neither needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return scale * x + buffer

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.scale * dy, dy.detach(), None


class Pair(torch.autograd.Function):
    """Two results, of which each has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * y

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * dx, 3 * dy


def with_a_buffer(x: Tensor) -> Tensor:
    return Sum.apply(x, torch.ones_like(x[0]), 0.5)


def plain_with_a_buffer(x: Tensor) -> Tensor:
    return 0.5 * x + torch.ones_like(x[0])


def one_of_two(x: Tensor) -> Tensor:
    used, _ = Pair.apply(x, x)
    return torch.tanh(used)


def one_constant(x: Tensor) -> Tensor:
    curved, straight = Pair.apply(x, x)
    return curved.square() + straight


class Auxiliary(torch.autograd.Function):
    """Hands on x, and adds a loss of its own by a gradient of ones, whatever arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extra: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.new_ones(())


def test_a_backward_that_returns_a_constant_is_accepted() -> None:
    model = network(middle=lambda x: torch.tanh(Auxiliary.apply(x, x.square().sum())))
    found = step(model, lambda_a=0.0)
    twin = network()
    loss = squares(twin(data())) + twin.get_submodule("first")(data()).square().sum()
    expected = grad(loss + gl.GradL1(twin, 0.3, 0.0)(loss), list(twin.parameters()))
    assert_gradients(found, expected, 1e-13)


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(function(cubes).apply, x, use_reentrant=False)


RIGHT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "curved": (function(cubes).apply, lambda x: x**3),
    "linear": (function(doubled, lambda x: 2 * x).apply, lambda x: 2 * x),
    "None and a buffer": (with_a_buffer, plain_with_a_buffer),
    "one result unused": (one_of_two, lambda x: torch.tanh(2 * x)),
    "one result used as it is": (one_constant, lambda x: 4 * x**2 + 3 * x),
    "checkpointed": (checkpointed, lambda x: x**3),
    "a gradient of zeros": (
        lambda x: function(zeros, torch.round).apply(x) + x,
        lambda x: torch.round(x).detach() + x,
    ),
}


@pytest.mark.parametrize("criterion", [squares, mean], ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", ["middle", "last"])
@pytest.mark.parametrize("case", RIGHT)
def test_a_function_with_a_correct_derivative_is_accepted(
    case: str, place: str, criterion: Callable[[Tensor], Tensor]
) -> None:
    custom, plain = (step(network(**{place: f}), criterion, lambda_a=0.0) for f in RIGHT[case])
    assert_gradients(custom, plain, 1e-12)


def test_frozen_layers_beside_a_custom_function() -> None:
    results = []
    for middle in (function(cubes).apply, lambda x: x**3):
        model = network(middle=middle)
        model.first.requires_grad_(False)
        results.append(step(model, lambda_a=0.0))
    assert_gradients(*results, 1e-12)


def test_hooks_are_removed_and_only_added_for_custom_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added, removed = [], []
    register = torch.autograd.function._HookMixin._register_hook
    handle = torch.utils.hooks.RemovableHandle.remove
    monkeypatch.setattr(
        torch.autograd.function._HookMixin,
        "_register_hook",
        staticmethod(lambda hooks, hook: (added.append(hook), register(hooks, hook))[1]),
    )
    monkeypatch.setattr(
        torch.utils.hooks.RemovableHandle, "remove", lambda self: (removed.append(self), handle(self))[1]
    )
    step(network())
    assert not added
    step(network(middle=function(cubes).apply))
    assert len(added) == len(removed) == 1
    with pytest.raises(RuntimeError, match="cuts"):
        step(network(middle=function(detaching(cubes)).apply))
    assert len(added) == len(removed) == 3  # the second look is one more


def test_functions_of_parametrizations_and_of_this_library_are_accepted() -> None:
    def softmax_grouped(x: Tensor) -> Tensor:
        return gl.functional.fake_quantize(
            F.softmax(x, -1), torch.tensor(0.01).double(), torch.tensor(0.0).double(), 0, 255
        )

    model = network(middle=softmax_grouped)
    model.add_module("extra", nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)).double())
    assert all(g is not None for g in step(model)[:4])
