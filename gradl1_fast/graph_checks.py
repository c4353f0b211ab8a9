"""A look at an autograd graph for what cannot be differentiated twice and would not say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["refuse_cut_region", "refuse_once_differentiable", "require_gradients"]

_COMPILED = (
    "GradL1: a region of torch.compile that ends before the penalty contributes to the loss, and it has no "
    "second derivative; compile loss and penalty together, with fullgraph=True and "
    "torch._dynamo.config.trace_autograd_ops = True"
)
_WRAPPER = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def refuse_once_differentiable(loss: Tensor) -> None:
    """Raise if a function that is differentiable only once contributes to ``loss``.

    The backward of such a custom function returns constants, so a penalty on gradients loses its own
    gradient there without a sound. That of a compiled region ends in a node that raises, which
    ``autograd.grad`` does not visit. Operations of PyTorch that lack a second derivative raise by themselves.

    Raises:
        RuntimeError: names the function.
    """
    for node in _nodes(loss):
        if node.name() == "CompiledFunctionBackward":
            raise RuntimeError(_COMPILED)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _WRAPPER:
            raise RuntimeError(
                f"{function.__module__}.{function.__qualname__} is once_differentiable: the gradient of a "
                "penalty on gradients would be lost in it; give its backward a derivative of its own"
            )


def refuse_cut_region(loss: Tensor) -> None:
    """Raise, while a region is being compiled, if the loss was computed outside of it, at least in part.

    The region cannot differentiate what lies before it twice, and does not say so everywhere.

    Raises:
        RuntimeError: says how to compile a step.
    """
    from torch._dynamo.comptime import comptime

    def look(context: Any) -> None:
        pending, seen = [context.get_local("loss").as_proxy().node], set()
        while pending:
            node = pending.pop()
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, Tensor) and not value.is_leaf:
                raise RuntimeError(_COMPILED)
            pending += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)

    comptime(look)


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def require_gradients(names: Sequence[str], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients, after checking that each has arrived.

    Raises:
        RuntimeError: names what got none.
    """
    missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
    if missing:
        raise RuntimeError(
            f"GradL1: no gradient reached {', '.join(missing)}. The loss does not depend on them, the graph "
            "is cut on the way (detach, no_grad, reentrant checkpointing), or the pass used other tensors in "
            "their place (functional_call). Freeze a weight that is not meant to be used, or make the "
            "penalty for the part of the model that is; and make the penalty before the forward pass"
        )
    return [grad for grad in grads if grad is not None]
