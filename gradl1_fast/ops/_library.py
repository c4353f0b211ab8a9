"""Registration of operators: schema, computation by the resolved backend, fake and derivative."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradl1_fast._checks import autocast_is_on
from gradl1_fast.backends import resolve

NAMESPACE = "gradl1_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class Operator:
    """A registered operator. Calling it is the same as calling ``torch.ops.gradl1_fast.<name>``.

    On ordinary tensors, a call runs the kernel of the derivative directly, because the dispatcher costs
    several times as much as the rest of the call. Under ``torch.compile``, dispatch modes, functorch and
    tensor subclasses, the call goes through the dispatcher.

    Args:
        op: the operation whose backend is resolved by the first tensor argument.
        schema: name, arguments and results, in the syntax of ``torch.library``.
        fake: computes empty results of the right shape, type and strides.
        compute: computes the results; by default the backend's function of the same name. It is not passed
            the probe, which exists only for the derivative.
    """

    def __init__(
        self, op: str, schema: str, fake: Callable[..., Any], compute: Callable[..., Any] | None = None
    ) -> None:
        self.name = schema.partition("(")[0]
        self._op = op
        self._has_probe = "probe)" in schema
        compute = compute or self._by_backend
        self._compute: Callable[..., Any] = lambda *args: _without_views(compute(*args))
        self._kernel: Callable[..., Any] = lambda values, *args: values(*args)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=LIBRARY)
        self._overload = getattr(torch.ops.gradl1_fast, self.name).default

    def __call__(self, *args: Any) -> Any:
        """Compute the results and record their derivative."""
        if _is_ordinary(args):
            return self._kernel(self._directly, *args)
        return self._overload(*args)

    def differentiate_by(self, kernel: Callable[..., Any]) -> None:
        """Register ``kernel(values, *args)`` as the entire autograd behaviour of the operator.

        ``values(*args)`` computes the results outside of autograd and autocast.
        """
        self._kernel = kernel
        LIBRARY.impl(self.name, partial(kernel, self._dispatched), "Autograd")

    def differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Register a derivative formula in the form of ``torch.library.register_autograd``.

        The gradient of an unused result is None; the formula is not called if all are None.
        """
        function = _function(setup_context, backward)

        def kernel(values: Callable[..., Any], *args: Any) -> Any:
            return function.apply(*args, values) if recorded(*args) else values(*args)

        self.differentiate_by(kernel)

    def refuse_third_order(self) -> None:
        """Make differentiating this operator, a double backward, raise an error.

        A derivative that raises is always visited. ``once_differentiable`` is silently wrong under
        ``autograd.grad``, which skips nodes that do not lead to a requested input.
        """

        def backward(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(f"{NAMESPACE}::{self.name}: first and second order gradients only")

        self.differentiate(lambda ctx, inputs, output: None, backward)

    def values(self, *args: Any) -> Any:
        """Compute the results outside of autograd and autocast."""
        return (self._directly if _is_ordinary(args) else self._dispatched)(*args)

    def _directly(self, *args: Any) -> Any:
        with _below_autograd(_first_tensor(args).device.type):
            return self._compute(*args)

    def _dispatched(self, *args: Any) -> Any:
        with _below_autograd(_first_tensor(args).device.type):
            return self._overload(*args)

    def _by_backend(self, *args: Any) -> Any:
        backend = resolve(self._op, _first_tensor(args))
        return getattr(backend, self.name)(*(args[:-1] if self._has_probe else args))


def _without_views(results: Any) -> Any:
    """Return the results with every view replaced by an alias of its memory that is not a view.

    A matrix product over more than two axes returns a view, and autograd refuses in-place changes of a view
    that a custom function returns.
    """
    if isinstance(results, Tensor):
        return results.detach() if results._is_view() else results
    return type(results)(map(_without_views, results))


def recorded(*args: Any) -> bool:
    """Return whether autograd records an operation on the tensors among ``args``.

    This includes forward-mode differentiation. A derivative without forward mode then raises, whereas values
    computed below autograd would lose their tangents.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    wanted = wanted or torch.autograd.forward_ad._current_level >= 0
    if wanted and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "gradl1_fast: torch.func.grad, vjp, jvp, jacrev and hessian cannot differentiate these "
            "operators; use torch.autograd.grad, with create_graph=True for a second order"
        )
    return wanted


def _function(
    setup_context: Callable[..., None], formula: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_and_values: Any) -> Any:
            *args, values = args_and_values
            ctx.set_materialize_grads(False)
            ctx.nothing = (None,) * len(args_and_values)
            output = values(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # A result that was not requested is empty, and so is its gradient.
            arrived = [None if g is None or g.shape == (0,) else g for g in grads]
            return ctx.nothing if all(g is None for g in arrived) else (*formula(ctx, *arrived), None)

    return Derivative


@contextlib.contextmanager
def _below_autograd_and_autocast(device: str) -> Any:
    with torch._C._AutoDispatchBelowAutograd(), torch.autocast(device, enabled=False):
        yield


def _below_autograd(device: str) -> contextlib.AbstractContextManager[None]:
    if autocast_is_on(device):
        return _below_autograd_and_autocast(device)
    return torch._C._AutoDispatchBelowAutograd()


def _is_ordinary(args: tuple[Any, ...]) -> bool:
    """Return whether a call on ``args`` can bypass the dispatcher, because only autograd needs to see it."""
    first = _first_tensor(args)
    return (
        not torch.compiler.is_compiling()
        and type(first) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None  # torch.jit.trace records dispatcher calls
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_legacy_batchedtensor(first)  # of autograd.grad(is_grads_batched=True)
    )


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise TypeError("gradl1_fast: an operator was called without a tensor")
