"""How an operator is registered: schema, computation by the resolved backend, fake, end of the line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends import resolve

NAMESPACE = "gradl1_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(op: str, schema: str, fake: Callable[..., Any], compute: Callable[..., Any] | None = None) -> None:
    """Register the operator of ``schema``.

    Args:
        op: the operation whose backend is resolved, from the first tensor among the arguments.
        schema: name, arguments and results, as ``torch.library`` writes them.
        fake: computes empty results of the right shape, type and strides.
        compute: computes the results; without it the backend's function of the same name does. It
            is not given a probe: that argument exists for the derivative alone.
    """
    name = schema.partition("(")[0]
    has_probe = "probe)" in schema

    def by_backend(*args: Any) -> Any:
        return getattr(resolve(op, _first_tensor(args)), name)(*(args[:-1] if has_probe else args))

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, compute or by_backend, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the derivative formula of operator ``name``.

    The gradient of a result that nobody used, or asked for, arrives as None; the formula is not
    called without any.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.nothing = tuple([None] * len(i) if _is_list_of_tensors(i) else None for i in inputs)
        setup_context(ctx, inputs, output)

    def formula(ctx: Any, *grads: Any) -> Any:
        grads = tuple([None if isinstance(g, Tensor) and g.shape == (0,) else g for g in grads])
        arrived = any(
            g is not None for grad in grads for g in (grad if isinstance(grad, list | tuple) else [grad])
        )
        return backward(ctx, *grads) if arrived else ctx.nothing

    torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup, lib=LIBRARY)


def differentiate_by(name: str, kernel: Callable[..., Any]) -> None:
    """Register ``kernel`` as the whole autograd behaviour of operator ``name``."""
    LIBRARY.impl(name, kernel, "Autograd")


def end_of_the_line(name: str) -> None:
    """Make differentiating operator ``name``, a double backward, an error.

    An operator with a backward that raises is loud everywhere; ``once_differentiable`` is silently
    wrong under ``autograd.grad``, which does not visit nodes that lead to no requested input.
    """

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"gradl1_fast::{name}: first and second order gradients only")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Call operators for their values alone; ``torch.library`` does the same inside its formulas."""
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]


def recorded(*tensors: Tensor | None) -> bool:
    """Return whether autograd records an operation on ``tensors``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if _is_list_of_tensors(arg):
            return arg[0]
    raise TypeError("gradl1_fast: an operator was called without a tensor")


def _is_list_of_tensors(arg: Any) -> bool:
    return isinstance(arg, list | tuple) and len(arg) > 0 and isinstance(arg[0], Tensor)
