"""Custom functions of others, in whose backward a penalty on gradients may lose its own without a sound."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.graph_checks import nodes_of

__all__ = ["gradients", "refuse_once_differentiable"]

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

    A model without such functions pays nothing. Where a function gave constants for constants, as the
    last one of a loss, a second pass tells a linear function from one that cuts.

    Args:
        loss: a single value.
        inputs: what is differentiated with respect to.
        functions: the nodes of custom functions in the graph of the loss.

    Raises:
        RuntimeError: names the function.
    """
    if not functions:
        return torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    unclear: list[Any] = []
    with _watched(functions, unclear.append):
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    _refuse_errors(grads, functions)
    if unclear:
        varying = torch.ones_like(loss, requires_grad=True)  # now nothing that arrives is a constant
        with _watched(unclear, lambda node: None):
            again = torch.autograd.grad(loss, inputs, varying, create_graph=True, allow_unused=True)
        _refuse_errors(again, unclear)
    return grads


def _refuse_errors(grads: Sequence[Tensor | None], functions: Sequence[Any]) -> None:
    if any(node.name() == _ERROR for node, _ in nodes_of([g for g in grads if g is not None])):
        raise RuntimeError(_once_differentiable(" or ".join(dict.fromkeys(map(_name, functions)))))


@contextlib.contextmanager
def _watched(functions: Sequence[Any], doubt: Callable[[Any], None]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for node in functions:
            handles.append(node.register_hook(partial(_refuse_cut, node, doubt)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_cut(
    node: Any,
    doubt: Callable[[Any], None],
    returned: Sequence[Tensor | None],
    arrived: Sequence[Tensor | None],
) -> None:
    """Raise if what a backward returned does not depend on what arrived; ``doubt`` it for constants."""
    pairs = zip(node.next_functions, returned, strict=True)
    constant = [g for (parent, _), g in pairs if parent is not None and g is not None and not g.requires_grad]
    if not constant:
        return
    if not all(g is None or g.requires_grad for g in arrived):
        doubt(node)
    elif any(g.any() for g in constant):  # zeros have no derivative to lose
        raise RuntimeError(
            f"GradL1: the backward of {_name(node)} cuts the graph (detach, no_grad, .data, a kernel without "
            "a derivative): the gradient of a penalty on gradients would be lost in it; give its backward a "
            "derivative of its own"
        )


def _is_marked(backward: Callable[..., Any]) -> bool:
    return _is_wrapper(inspect.unwrap(backward, stop=_is_wrapper))


def _is_wrapper(function: Callable[..., Any]) -> bool:
    return getattr(function, "__code__", None) is _WRAPPER


def _once_differentiable(name: str) -> str:
    return (
        f"{name} is once_differentiable: the gradient of a penalty on gradients would be lost in it; give "
        "its backward a derivative of its own"
    )


def _name(node: Any) -> str:
    return f"{node._forward_cls.__module__}.{node._forward_cls.__qualname__}"
