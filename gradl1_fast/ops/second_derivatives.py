"""Second derivatives that PyTorch does not provide: of fused attention and of the hard sigmoid.

PyTorch computes the gradients of ``scaled_dot_product_attention`` and ``hardsigmoid`` with backward
operators that have no derivative of their own, so a penalty on gradients raises "derivative for aten::... is
not implemented". :func:`install` registers these derivatives. First gradients remain those of PyTorch's
kernels, bit for bit; gradients of higher order are those of the unfused form.

Forward mode, and attention under ``torch.func`` or on nested tensors, are not affected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["install"]

_CPU, _CUDA = "AutogradCPU", "AutogradCUDA"
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": _CPU,
    "_scaled_dot_product_flash_attention_backward": _CUDA,
    "_scaled_dot_product_efficient_attention_backward": _CUDA,
    "_scaled_dot_product_cudnn_attention_backward": _CUDA,
}
_SIXTH = 0.1666666716337204  # 1/6 rounded to float32, as in PyTorch's kernels for all types
_LOCK = threading.Lock()
_installed: list[torch.library.Library] = []  # a registration lasts as long as its library

# PyTorch's own kernel, called with the arguments of the operator.
_Original = Callable[..., Any]


def install() -> None:
    """Make fused attention and ``hardsigmoid`` differentiable any number of times, on CPU and CUDA.

    Autograd kernels are registered for PyTorch's backward operators, in the whole process. Further calls
    do nothing.

    A backward pass without ``create_graph`` computes the same bits as before; each of these operators
    costs a few microseconds more. With ``create_graph`` the first gradients are still those of the fused
    kernels. Differentiating them recomputes attention once per layer in its unfused form. This takes a
    few times as long as the fused forward and backward passes, and memory for several L × S matrices per
    head, for L queries and S keys, which is freed layer by layer.

    Dropout inside fused attention, which only CUDA has, cannot be reproduced: differentiating such
    gradients raises a RuntimeError. A NaN in the input of ``hardsigmoid`` lets the gradient pass under
    ``create_graph``, where PyTorch's kernel returns 0.
    """
    with _LOCK:
        if not _installed:
            _installed.append(_register())


def _register() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for key in (_CPU, _CUDA):
        _override(library, "hardsigmoid_backward", key, _hardsigmoid_backward)
    for name, key in _ATTENTION.items():
        if hasattr(torch.ops.aten, name):
            _override(library, name, key, _AttentionBackward.kernel(name))
    return library


def _override(library: torch.library.Library, name: str, key: str, kernel: Callable[..., Any]) -> None:
    """Make ``kernel(original, *args)`` compute an operator whenever autograd records it."""
    original = torch.library.get_kernel(f"aten::{name}", key)

    def dispatched(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        # PyTorch's autograd kernel raises in forward mode; the kernel below it would drop the tangents.
        plain = partial(original.call_boxed, keys)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return kernel(plain, *args, **kwargs)
        return plain(*args, **kwargs)

    library.impl(name, dispatched, key, with_keyset=True, allow_override=True)


def _hardsigmoid_backward(original: _Original, grad_output: Tensor, x: Tensor) -> Tensor:
    # The gradient passes where that of hardtanh does, whose backward PyTorch can differentiate.
    return torch.ops.aten.hardtanh_backward(grad_output * _SIXTH, x, -3.0, 3.0)


class _Options(NamedTuple):
    """Arguments of attention that are not tensors; the defaults are those of the schemas."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None


class _AttentionBackward(torch.autograd.Function):
    """The gradients of fused attention, whose derivative is that of unfused attention.

    The fused kernels also take the output and its log-sum-exp. These are functions of query, key, value
    and bias, and their contribution is part of the derivatives for those.
    """

    @classmethod
    def kernel(cls, name: str) -> Callable[..., Any]:
        """Return the kernel of an operator, which finds its arguments by their names in the schema."""
        schema = getattr(torch.ops.aten, name).default._schema
        names = [argument.name.rstrip("_") for argument in schema.arguments]

        def kernel(original: _Original, *args: Any, **kwargs: Any) -> Any:
            # torch.func records a graph even for a first gradient, and cannot transform this function.
            if torch._C._are_functorch_transforms_active():
                return original(*args, **kwargs)
            # The dispatcher omits trailing arguments that have their default value.
            given = dict(zip(names, args, strict=False)) | kwargs
            bias = given.get("attn_mask", given.get("attn_bias"))
            operands = [given[name] for name in ("grad_out", "query", "key", "value")]
            options = _Options(**{field: given[field] for field in _Options._fields if field in given})
            return cls.apply(*operands, bias, options, partial(original, *args, **kwargs))

        return kernel

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients that the fused kernel computes."""
        *operands, options, fused = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        ctx.options = options
        return fused()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients of unfused attention."""
        if ctx.options.dropout_p > 0:
            raise RuntimeError(
                "gradl1_fast: fused attention with dropout has no second derivative, because its random "
                "mask is not kept; set dropout_p=0, or run the forward pass under "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )
        if all(grad is None for grad in grads):
            return (None,) * 7
        required = ctx.needs_input_grad[:5]
        results = iter(_differentiate(ctx.saved_tensors, ctx.options, grads, required))
        return *[next(results) if want else None for want in required], None, None


def _differentiate(
    saved: tuple[Tensor | None, ...],
    options: _Options,
    grads: tuple[Tensor | None, ...],
    required: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the vector-Jacobian products of the first gradients, computed in the unfused form.

    Args:
        saved: gradient of the output, query, key, value and bias.
        options: the options of attention.
        grads: cotangents of the gradients for query, key, value and, if there is a fourth, bias.
        required: which of ``saved`` to differentiate with respect to.
    """
    create_graph = torch.is_grad_enabled()
    cotangents = [grad for grad in grads if grad is not None]
    with torch.enable_grad(), torch.autocast(cotangents[0].device.type, enabled=False):
        operands: list[Any] = [None if t is None else _alias(t, create_graph) for t in saved]
        inputs = [x for x, grad in zip(operands[1:], grads, strict=False) if grad is not None]
        output = _attention(operands[1:], options)
        first = torch.autograd.grad(output, inputs, operands[0], create_graph=True)
        targets = [x for x, want in zip(operands, required, strict=True) if want]
        return torch.autograd.grad(first, targets, cotangents, create_graph=create_graph, allow_unused=True)


def _attention(operands: list[Any], options: _Options) -> Tensor:
    # enable_gqa has no effect where the numbers of heads agree.
    return torch.ops.aten._scaled_dot_product_attention_math(
        *operands, 0.0, options.is_causal, scale=options.scale, enable_gqa=True
    )[0]


def _alias(tensor: Tensor, keep_graph: bool) -> Tensor:
    """Return an alias to differentiate with respect to, since the operands may depend on each other."""
    if keep_graph and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()
