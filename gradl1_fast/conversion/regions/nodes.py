"""Decides which nodes of a graph a region supports, and converts them to operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast.conversion.execution import batch_norm_act
from gradl1_fast.conversion.graphs import ADDITIONS, activation_of, changes_in_place, module_of, operation_of
from gradl1_fast.conversion.regions.builder import Builder
from gradl1_fast.conversion.regions.measuring import BatchNorm
from gradl1_fast.conversion.regions.operations import (
    Activation,
    Add,
    Cat,
    Convolution,
    Linear,
    MaxPool,
    Operation,
    Pool,
    Reshape,
)
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QLinear, QuantizedLayer

__all__ = ["emit", "inputs_of", "layer_in", "modules_in", "norm_in", "shares_memory", "supports"]

_CONVOLUTIONS = (QConv1d, QConv2d, QConv3d)
_FLATTEN = {torch.flatten, "flatten"}
_MEAN = {torch.mean, "mean"}
_CAT = {torch.cat, torch.concat}
_aten: Any = torch.ops.aten


def layer_in(root: nn.Module, node: fx.Node) -> Any:
    """Return the layer that a node calls if a region can compute it, or None."""
    module: Any = module_of(root, node)
    if type(module) is QLinear:
        return module if _has_own_weight(module) else None
    if type(module) not in _CONVOLUTIONS or not _has_own_weight(module):
        return None
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return module if plain and len(node.args) == 1 and not node.kwargs else None


def norm_in(root: nn.Module, node: fx.Node) -> Any:
    """Return the batch norm of a fused node, or None."""
    if node.target is not batch_norm_act:
        return None
    module: Any = node.args[0]
    return root.get_submodule(str(module.target))


def supports(root: nn.Module, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Return whether a node can join a region that consists of the nodes ``inside``.

    A region starts with a product or a batch norm, so that its results depend on parameters. Nodes that read
    a parameter or buffer of the container itself are excluded: the inputs of a region are computed tensors.
    """
    if any(source.op == "get_attr" for source in inputs_of(node)):
        return False
    if layer_in(root, node) is not None or norm_in(root, node) is not None:
        return True
    sources = inputs_of(node)
    return any(source in inside for source in sources) and _simple(root, node, inside) is not None


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors a node reads."""
    if node.target is batch_norm_act:
        return [x for x in node.args[1:3] if isinstance(x, fx.Node)]
    return node.all_input_nodes


def shares_memory(root: nn.Module, node: fx.Node) -> bool:
    """Return whether the result of a supported node shares the memory of its input."""
    kind = type(module_of(root, node))
    return kind is nn.Flatten or operation_of(node) in _FLATTEN


def modules_in(root: nn.Module, node: fx.Node) -> list[nn.Module]:
    """Return the modules whose parameters a node reads."""
    return [m for m in (layer_in(root, node), norm_in(root, node)) if m is not None]


def emit(root: nn.Module, node: fx.Node, builder: Builder) -> None:
    """Add the operations of a node."""
    layer, norm = layer_in(root, node), norm_in(root, node)
    if layer is not None:
        _emit_layer(node, layer, builder)
    elif norm is not None:
        _emit_norm(node, norm, builder)
    else:
        make = _simple(root, node, None)
        assert make is not None
        sources = [builder.slot(source) for source in inputs_of(node)]
        active = any(map(builder.needs_slot, sources))
        builder.give(node, builder.append(make(sources), active))


def _emit_layer(node: fx.Node, layer: QuantizedLayer, builder: Builder) -> None:
    x = builder.read(node.args[0], layer)  # type: ignore[arg-type]
    weight, bias = builder.argument(layer, "weight"), builder.argument(layer, "bias")
    needs = builder.needs_slot(x), builder.needs(weight), builder.needs(bias)
    common = x, weight, bias, needs, builder.dtype
    module: Any = layer
    operation: Operation
    if isinstance(layer, QLinear):
        operation = Linear(*common)  # type: ignore[arg-type]
    else:
        sizes = [list(values) for values in (module.stride, module.padding, module.dilation)]
        zeros = [0] * len(module.stride)
        operation = Convolution(*common, geometry=(*sizes, False, zeros, module.groups))
    builder.give(node, builder.append(operation, any(needs)))


def _emit_norm(node: fx.Node, norm: nn.BatchNorm2d, builder: Builder) -> None:
    x, residual, activation = node.args[1:4]
    slots = [None if n is None else builder.slot(n) for n in (x, residual)]  # type: ignore[arg-type]
    weight, bias = builder.argument(norm, "weight"), builder.argument(norm, "bias")
    needs = builder.needs(weight), builder.needs(bias)
    active = any(needs) or any(builder.needs_slot(slot) for slot in slots if slot is not None)
    operation = BatchNorm(norm, slots[0], slots[1], weight, bias, needs, str(activation))  # type: ignore[arg-type]
    builder.norm(node, operation, active)


def _simple(
    root: nn.Module, node: fx.Node, inside: set[fx.Node] | None
) -> Callable[[list[int]], Operation] | None:
    """Return a function from the slots that a node reads to its operation; None if it is not supported.

    A tensor that is changed in place must be computed in the region and have no other reader.
    """
    if inside is not None and changes_in_place(root, node):
        changed = node.all_input_nodes[0] if node.all_input_nodes else None
        if changed is None or changed not in inside or len(changed.users) > 1:
            return None
    activation = activation_of(root, node)
    if activation is not None:
        return lambda x: Activation(x[0], activation)
    module = module_of(root, node)
    return _of_function(node) if module is None else _of_module(module)


def _of_module(module: nn.Module) -> Callable[[list[int]], Operation] | None:
    kind = type(module)
    options: Any = module
    if kind is nn.Flatten:
        return lambda x: Reshape(x[0], lambda t: t.flatten(options.start_dim, options.end_dim))
    if kind is nn.MaxPool2d and not options.return_indices:
        sizes = [_pair(v) for v in (options.kernel_size, options.stride, options.padding, options.dilation)]
        return lambda x: MaxPool(x[0], (*sizes, options.ceil_mode))
    if kind is nn.AdaptiveAvgPool2d and options.output_size in (1, (1, 1)):
        return _mean((-1, -2), keepdim=True)
    if kind is nn.AvgPool2d:
        return lambda x: _average(x[0], options)
    return None


def _of_function(node: fx.Node) -> Callable[[list[int]], Operation] | None:
    operation: Any = operation_of(node)
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if operation in ADDITIONS:
        tensors = len(nodes) == len(node.args) == 2 and not node.kwargs and nodes[0] is not nodes[1]
        return (lambda x: Add(x[0], x[1])) if tensors else None
    if operation in _FLATTEN and not node.kwargs and len(nodes) == 1:
        ends: Any = node.args[1:]
        return lambda x: Reshape(x[0], lambda t: t.flatten(*ends))
    if operation in _MEAN:
        options: Any = node.args[1:]
        return _mean(*options, **node.kwargs)  # type: ignore[arg-type]
    if operation in _CAT:
        parts: Any = node.args[0]
        axis: Any = (*node.args[1:], *node.kwargs.values())
        plain = isinstance(parts, list | tuple) and len(axis) <= 1 and set(node.kwargs) <= {"dim", "axis"}
        if plain and all(isinstance(p, fx.Node) for p in parts) and len(set(parts)) == len(parts):
            return lambda x: Cat(x, axis[0] if axis else 0)
    return None


def _mean(dim: Any = None, keepdim: bool = False, **options: Any) -> Callable[[list[int]], Operation] | None:
    """Return a function from slots to a mean over the given integer axes; None if it is not supported."""
    axes = [dim] if isinstance(dim, int) else dim
    if options or not axes or not all(isinstance(axis, int) for axis in axes):
        return None

    def count(x: Tensor) -> int:
        return math.prod(x.shape[axis] for axis in axes)

    def backward(dy: Tensor, x: Tensor) -> Tensor:
        shape = [1 if i in {axis % x.dim() for axis in axes} else size for i, size in enumerate(x.shape)]
        return dy.reshape(shape).expand_as(x) / count(x)

    def forward(x: Tensor) -> Tensor:
        return x.mean(axes, keepdim)

    return lambda x: Pool(x[0], forward, backward, lambda v: (v / count(v)).sum(axes, keepdim))


def _average(x: int, pool: Any) -> Operation:
    options = (
        _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), pool.ceil_mode,
        pool.count_include_pad, pool.divisor_override,
    )  # fmt: skip
    forward, backward = _aten.avg_pool2d.default, _aten.avg_pool2d_backward.default
    return Pool(x, lambda t: forward(t, *options), lambda dy, t: backward(dy, t, *options))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _has_own_weight(module: Any) -> bool:
    return module._parameters.get("weight") is not None
