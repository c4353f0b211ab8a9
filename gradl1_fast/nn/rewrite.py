"""Rewriting of a traced graph: in-place operations made plain, batch norms fused with what follows."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx, nn

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d

_RELU = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RELU6 = {nn.functional.relu6}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PLAIN = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    nn.functional.relu_: torch.relu,
}


def module_of(graph_root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return graph_root.get_submodule(str(node.target)) if node.op == "call_module" else None


def count_calls(root: nn.Module, graph: fx.Graph) -> Counter[int]:
    """Return how often each module is called, by the identity of the module."""
    return Counter(id(module_of(root, node)) for node in graph.nodes if node.op == "call_module")


def remove_in_place(root: nn.Module, graph: fx.Graph) -> None:
    """Replace in-place operations by plain ones, and let later readers of the operand read the result.

    A tap hands on a view of its input, which PyTorch does not allow to be changed in place.
    """
    in_place = [module for module in root.modules() if getattr(module, "inplace", False)]
    for module in in_place:
        module.inplace = False  # type: ignore[assignment]
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if module_of(root, node) in in_place or _make_plain(node):
            operand = node.all_input_nodes[0]
            for reader in [user for user in operand.users if order[user] > order[node]]:
                reader.replace_input_with(operand, node)


def _make_plain(node: fx.Node) -> bool:
    """Make ``node`` a plain operation; return whether it changed its first argument in place."""
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_function" and node.target in _PLAIN:
        node.target = _PLAIN[node.target]
        return isinstance(node.args[0], fx.Node)
    return _plain_method(node)


def _plain_method(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op != "call_method" or not name.endswith("_") or name.startswith("__"):
        return False
    if not hasattr(torch.Tensor, name[:-1]):
        return False
    node.target = name[:-1]
    return True


def fuse_batch_norms(root: nn.Module, graph: fx.Graph) -> None:
    """Replace each ``nn.BatchNorm2d`` by a ``BatchNormAct2d`` that takes in what follows it.

    That is an activation, or the sum with a residual and an activation. A batch norm that is called
    in several places takes in nothing.
    """
    calls = count_calls(root, graph)
    for node in list(graph.nodes):
        module = module_of(root, node)
        if type(module) is not nn.BatchNorm2d:
            continue
        tail = _tail(root, node) if calls[id(module)] == 1 else None
        activation = "none" if tail is None else tail[0]
        replace_module(root, module, BatchNormAct2d.from_float(module, activation=activation))
        if tail is not None:
            _take_in(graph, node, *tail[1:])
    graph.lint()


def _tail(root: nn.Module, node: fx.Node) -> tuple[str, fx.Node, fx.Node | None] | None:
    """Return the activation that ends the fused operation, its node, and the residual if there is one."""
    user = _only_user(node)
    if user is None:
        return None
    activation = _activation(root, user)
    if activation is not None:
        return activation, user, None
    end = _only_user(user)
    residual = _residual(user, node)
    activation = None if end is None or residual is None else _activation(root, end)
    return None if activation is None or end is None else (activation, end, residual)


def _take_in(graph: fx.Graph, node: fx.Node, end: fx.Node, residual: fx.Node | None) -> None:
    with graph.inserting_before(end):
        kwargs = {**node.kwargs, **({} if residual is None else {"residual": residual})}
        fused = graph.call_module(str(node.target), node.args, kwargs)
    middle = _only_user(node)
    end.replace_all_uses_with(fused)
    graph.erase_node(end)
    if middle is not None and middle is not end:
        graph.erase_node(middle)
    graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(root: nn.Module, node: fx.Node) -> str | None:
    module = module_of(root, node)
    if module is not None:
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
    if node.target in _RELU:
        return "relu"
    return "relu6" if node.target in _RELU6 else None


def _residual(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """Return the other operand if ``node`` adds a tensor to ``operand``."""
    if node.target not in _ADD or node.kwargs or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not operand]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of the tree where ``old`` stands."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
