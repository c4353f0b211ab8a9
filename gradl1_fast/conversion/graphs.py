"""Queries on the nodes of a traced graph."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from gradl1_fast.conversion.trace import IN_PLACE_OPERATORS, is_leaf
from gradl1_fast.nn.layers import QuantizedLayer

__all__ = [
    "ADDITIONS",
    "RELU",
    "RELU6",
    "activation_of",
    "changes_in_place",
    "kind_of",
    "layer_of",
    "may_return_input",
    "module_of",
    "operation_of",
    "returns_input",
]

_functional = nn.functional
RELU = {torch.relu, torch.relu_, _functional.relu, _functional.relu_, "relu", "relu_"}
RELU6 = {_functional.relu6}
_SOMETIMES_ITSELF = {
    *("bfloat16", "contiguous", "cpu", "cuda", "double", "flatten", "float", "half", "to", "type", "type_as"),
    *("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"),
    *("broadcast_tensors", "conj", "pos", "positive", "ravel", "real", "resolve_conj", "sum_to_size"),
}
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def module_of(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def layer_of(root: nn.Module, node: fx.Node) -> QuantizedLayer | None:
    """Return the layer of this library that a node calls, or None."""
    module = module_of(root, node)
    return module if isinstance(module, QuantizedLayer) else None


def operation_of(node: fx.Node) -> object:
    """Return the function, or the name of the method, that a node calls, or None."""
    return node.target if node.op in ("call_function", "call_method") else None


def kind_of(root: nn.Module, node: fx.Node) -> str:
    """Return the name of the class or function that a node calls."""
    module, operation = module_of(root, node), operation_of(node)
    return type(module).__name__ if module is not None else str(getattr(operation, "__name__", operation))


def activation_of(root: nn.Module, node: fx.Node) -> str | None:
    """Return the activation that a node computes, as named by the fused operation, or None."""
    module = module_of(root, node)
    if module is not None:
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
    if operation_of(node) in RELU:
        return "relu"
    return "relu6" if operation_of(node) in RELU6 else None


def returns_input(root: nn.Module, node: fx.Node) -> bool:
    """Return whether the result of a node is its input tensor itself, in the current mode."""
    module = module_of(root, node)
    same = type(module) is nn.Identity or (isinstance(module, _DropoutNd) and not module.training)
    return same and len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def may_return_input(root: nn.Module, node: fx.Node) -> bool:
    """Return whether the result of a node may be its input tensor itself."""
    if isinstance(module_of(root, node), nn.Identity | nn.Flatten | _DropoutNd):
        return True
    operation = operation_of(node)
    return getattr(operation, "__name__", operation) in _SOMETIMES_ITSELF


def changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node changes a tensor in place, or might, such as a call of an untraced module."""
    module = module_of(root, node)
    if module is not None:
        return bool(getattr(module, "inplace", False)) or not is_leaf(module)
    if node.target in IN_PLACE_OPERATORS or node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    name = str(getattr(node.target, "__name__", node.target))
    python = getattr(node.target, "__module__", "") == "_operator"  # and_, or_, not_
    return operation_of(node) is not None and name.endswith("_") and not name.startswith("_") and not python
