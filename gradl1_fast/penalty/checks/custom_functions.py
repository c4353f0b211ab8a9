"""Custom functions of others, in whose backward a penalty on gradients may lose its own without a sound."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.penalty.checks.graph import nodes_of

__all__ = ["gradients", "refuse_once_differentiable"]

Constants = dict[Any, dict[int, Tensor]]

_WRAPPER = torch.autograd.function.once_differentiable(lambda ctx: None).__code__
_ERROR = "torch::autograd::Error"  # what the wrapper leaves in the graph; autograd.grad walks past it


def refuse_once_differentiable(functions: Sequence[Any]) -> None:
    """Raise if the backward of a function is marked ``once_differentiable``, under other decorators too.

    Args:
        functions: nodes of custom functions.

    Raises:
        RuntimeError: names the function.
    """
    for node in functions:
        function = node._forward_cls
        if any(map(_is_marked, (function.backward, function.vjp))):  # two names for one thing
            raise RuntimeError(_once_differentiable(_name(node)))


def gradients(loss: Tensor, inputs: Sequence[Tensor], functions: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``loss`` with their graph, which no custom backward may have cut.

    A model without such functions pays nothing. Where one returned something without a graph, a second pass
    for twice the loss tells a constant, and a linear function that was given constants, from a cut.

    Args:
        loss: a single value.
        inputs: what is differentiated with respect to.
        functions: the nodes of custom functions in the graph of the loss.

    Raises:
        RuntimeError: names the function.
    """
    if not functions:
        return torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    first: Constants = {}
    with _watched(functions, first):
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    _refuse_errors(grads, functions)
    if first:
        second: Constants = {}
        twice = torch.full_like(loss, 2.0, requires_grad=True)  # now nothing that arrives is a constant
        with _watched(list(first), second):
            again = torch.autograd.grad(loss, inputs, twice, create_graph=True, allow_unused=True)
        _refuse_errors(again, list(first))
        _refuse_cuts(first, second)
    return grads


def _refuse_errors(grads: Sequence[Tensor | None], functions: Sequence[Any]) -> None:
    if any(node.name() == _ERROR for node, _ in nodes_of([g for g in grads if g is not None])):
        raise RuntimeError(_once_differentiable(" or ".join(dict.fromkeys(map(_name, functions)))))


@contextlib.contextmanager
def _watched(functions: Sequence[Any], found: Constants) -> Iterator[None]:
    """Write down what each function returns without a graph, by the place of the input."""

    def look(node: Any, returned: Sequence[Tensor | None], _arrived: Sequence[Tensor | None]) -> None:
        pairs = enumerate(zip(node.next_functions, returned, strict=True))
        constants = {i: g for i, ((to, _), g) in pairs if to is not None and g is not None}
        constants = {i: g for i, g in constants.items() if not g.requires_grad}
        if constants:
            found[node] = constants

    handles: list[Any] = []
    try:
        for node in functions:
            handles.append(node.register_hook(partial(look, node)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_cuts(first: Constants, second: Constants) -> None:
    """Raise if a result without a graph doubled with the loss; a constant does not change."""
    for node, constants in second.items():
        before = first[node]
        if any(i in before and not torch.equal(g, before[i]) for i, g in constants.items()):
            raise RuntimeError(
                f"GradL1: the backward of {_name(node)} cuts the graph (detach, no_grad, .data, a kernel "
                "without a derivative), so the gradient of the penalty would be lost; make its backward "
                "differentiable"
            )


def _is_marked(backward: Callable[..., Any]) -> bool:
    return _is_wrapper(inspect.unwrap(backward, stop=_is_wrapper))


def _is_wrapper(function: Callable[..., Any]) -> bool:
    return getattr(function, "__code__", None) is _WRAPPER


def _once_differentiable(name: str) -> str:
    return (
        f"{name} is once_differentiable, so the gradient of the penalty would be lost; make its backward "
        "differentiable"
    )


def _name(node: Any) -> str:
    return f"{node._forward_cls.__module__}.{node._forward_cls.__qualname__}"
