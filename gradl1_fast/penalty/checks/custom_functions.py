"""Checks third-party custom functions, whose backward may silently lose the gradient of the penalty."""

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
_ERROR = "torch::autograd::Error"  # the node that the wrapper adds; autograd.grad does not visit it


def refuse_once_differentiable(functions: Sequence[Any]) -> None:
    """Raise if the backward of a function is marked ``once_differentiable``, also below other decorators.

    Args:
        functions: the nodes of custom functions.

    Raises:
        RuntimeError: names the function.
    """
    for node in functions:
        function = node._forward_cls
        if any(map(_is_marked, (function.backward, function.vjp))):  # both name the backward
            raise RuntimeError(_once_differentiable(_name(node)))


def gradients(loss: Tensor, inputs: Sequence[Tensor], functions: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``loss`` with their graph; raise if a custom backward has cut the graph.

    This costs nothing without such functions. If a backward returned a result without a graph, a second pass
    for twice the loss distinguishes a cut from a constant and from a linear function of constants.

    Args:
        loss: a single value.
        inputs: the tensors to differentiate with respect to.
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
        twice = torch.full_like(loss, 2.0, requires_grad=True)  # so that no incoming gradient is a constant
        with _watched(list(first), second):
            again = torch.autograd.grad(loss, inputs, twice, create_graph=True, allow_unused=True)
        _refuse_errors(again, list(first))
        _refuse_cuts(first, second)
    return grads


def _refuse_errors(grads: Sequence[Tensor | None], functions: Sequence[Any]) -> None:
    if any(node.name() == _ERROR for node, _ in nodes_of([g for g in grads if g is not None])):
        raise RuntimeError(_once_differentiable(" or ".join(dict.fromkeys(map(_name, functions)))))


@contextlib.contextmanager
def _watched(functions: Sequence[Any], constants_of: Constants) -> Iterator[None]:
    """Record the results of each function that have no graph, by the index of the input."""

    def look(node: Any, returned: Sequence[Tensor | None], _arrived: Sequence[Tensor | None]) -> None:
        pairs = enumerate(zip(node.next_functions, returned, strict=True))
        constants = {i: g for i, ((to, _), g) in pairs if to is not None and g is not None}
        constants = {i: g for i, g in constants.items() if not g.requires_grad}
        if constants:
            constants_of[node] = constants

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
