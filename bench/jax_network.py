"""A plain PyTorch network as a function in JAX, with the same weights: its traced graph, node by node.

Images and activations are NHWC and kernels HWIO, which is what XLA computes fastest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.sites import displaced

__all__ = ["from_torch", "network", "to_torch"]

Parameters = dict[str, Any]


def network(model: nn.Module) -> Callable[[Parameters, Any, list[Any]], Any]:
    """Return ``logits(parameters, images, displacements)``; see :func:`bench.sites.displaced`.

    Args:
        model: of convolutions, batch norm in training, ReLU, ReLU6, pooling, linear layers and sums.

    Raises:
        NotImplementedError: the model has something else.
    """
    graph = displaced(model)
    modules = dict(graph.named_modules())

    def logits(parameters: Parameters, x: Any, displacements: list[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter([x, *displacements])
        for node in graph.graph.nodes:
            if node.op == "output":
                return values[node.args[0]]
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            args = [values.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
            if node.op == "call_module":
                values[node] = _module(modules[node.target], node.target, parameters)(*args)
            else:
                values[node] = _function(node.target)(*args, **node.kwargs)
        raise AssertionError("a graph ends with its output")

    return logits


def from_torch(name: str, value: Tensor) -> Any:
    """Return a parameter of the torch model in JAX's layout."""
    array = jnp.asarray(value.detach().cpu().contiguous().numpy())
    return jnp.transpose(array, (2, 3, 1, 0)) if value.dim() == 4 else array


def to_torch(name: str, value: Any) -> Tensor:
    """Return a parameter, or its gradient, in torch's layout."""
    array = jnp.transpose(value, (3, 2, 0, 1)) if value.ndim == 4 else value
    return torch.from_numpy(jax.device_get(array).copy())


def _module(module: nn.Module, name: str, parameters: Parameters) -> Callable[[Any], Any]:
    own = {key: parameters.get(f"{name}.{key}") for key in ("weight", "bias")}
    for kind, compute in _MODULES.items():
        if isinstance(module, kind):
            return lambda x: compute(module, x, **own)
    raise NotImplementedError(f"no JAX translation of {type(module).__name__}")


def _function(function: Any) -> Callable[..., Any]:
    if function not in _FUNCTIONS:
        raise NotImplementedError(f"no JAX translation of {function}")
    return _FUNCTIONS[function]


def _conv(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        module.stride,
        [(p, p) for p in module.padding],
        rhs_dilation=module.dilation,
        feature_group_count=module.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y if bias is None else y + bias


def _batch_norm(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    mean = x.mean((0, 1, 2))
    variance = jnp.square(x - mean).mean((0, 1, 2))
    return (x - mean) * (weight * jax.lax.rsqrt(variance + module.eps)) + bias


def _linear(module: Any, x: Any, weight: Any, bias: Any) -> Any:
    return x @ weight.T + bias


def _max_pool(module: Any, x: Any, **_: Any) -> Any:
    size, stride, padding = (
        (n, n) if isinstance(n, int) else n for n in (module.kernel_size, module.stride, module.padding)
    )
    edges = ((0, 0), *((p, p) for p in padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *size, 1), (1, *stride, 1), edges)


def _mean(module: Any, x: Any, **_: Any) -> Any:
    if module.output_size not in (1, (1, 1)):
        raise NotImplementedError("JAX translation: only average pooling to one value")
    return x.mean((1, 2), keepdims=True)


def _flatten(x: Any, start_dim: int = 1) -> Any:
    if x.ndim == 4 and x.shape[1:3] != (1, 1):
        raise NotImplementedError("JAX translation: NHWC is flattened in another order")
    return x.reshape(x.shape[0], -1)


def _elementwise(compute: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda module, x, **_: compute(x)


_relu6: Callable[[Any], Any] = partial(jnp.clip, min=0, max=6)
_MODULES: dict[Any, Callable[..., Any]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.ReLU6: _elementwise(_relu6),
    nn.ReLU: _elementwise(jax.nn.relu),
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _mean,
    nn.Flatten: _elementwise(_flatten),
    nn.Identity: _elementwise(lambda x: x),
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: operator.add,
    torch.add: operator.add,
    F.relu: lambda x, inplace=False: jax.nn.relu(x),
    torch.relu: jax.nn.relu,
    F.relu6: lambda x, inplace=False: _relu6(x),
    torch.flatten: _flatten,
}
