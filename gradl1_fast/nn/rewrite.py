"""Rewriting of a traced graph: in-place operations made plain, batch norms fused with what follows."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.graphs import count_calls, memory_of, module_of, name_in_place, operation_of
from gradl1_fast.nn.trace import IN_PLACE_OPERATORS, NotTraceableError, has_hooks

_RELU = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_"}
_RELU6 = {nn.functional.relu6}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


def remove_in_place(root: nn.Module, graph: fx.Graph) -> None:
    """Replace in-place operations by plain ones, and let later readers of the operand read the result.

    A tap hands on a view of its input, which PyTorch does not allow to be changed in place.

    Raises:
        NotTraceableError: an in-place operation has no plain form, or it changes what is read under
            another name as well.
    """
    in_place = [module for module in root.modules() if getattr(module, "inplace", False)]
    for module in in_place:
        module.inplace = False  # type: ignore[assignment]
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = memory_of(root, graph)
    for node in graph.nodes:
        if module_of(root, node) in in_place or _make_plain(node):
            operand = node.all_input_nodes[0]
            for start in memory[operand]:
                if start.op == "get_attr":
                    raise NotTraceableError(f"its forward pass may change {start.target}")
            same_memory = [n for n in memory if order[n] < order[node] and memory[n] & memory[operand]]
            _refuse_other_readers(node, operand, same_memory, order)
            for reader in _readers_after(node, operand, order):
                reader.replace_input_with(operand, node)


def _readers_after(node: fx.Node, operand: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    return [user for user in operand.users if order[user] > order[node]]


def _refuse_other_readers(
    node: fx.Node, operand: fx.Node, same_memory: list[fx.Node], order: dict[fx.Node, int]
) -> None:
    # Of a number, which `+=` does not change for other readers, a graph cannot tell a tensor.
    uncertain = node.target in IN_PLACE_OPERATORS.values()
    for other in same_memory:
        if (other is not operand or uncertain) and _readers_after(node, other, order):
            raise NotTraceableError(f"{node.name} changes {other.name} in place, which is read again")


def _make_plain(node: fx.Node) -> bool:
    """Make ``node`` a plain operation; return whether it changed its first argument in place."""
    if node.kwargs.get("out") is not None:
        raise NotTraceableError(f"{node.name} writes into a given tensor")
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_function" and node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
        return isinstance(node.args[0], fx.Node)
    name = name_in_place(node)
    if name is None:
        return False
    homes = (torch.Tensor,) if node.op == "call_method" else (torch, nn.functional)
    plain = [found for home in homes if callable(found := getattr(home, name[:-1], None))]
    if not plain:
        raise NotTraceableError(f"{name} changes a tensor in place")
    node.target = name[:-1] if node.op == "call_method" else plain[0]
    return True


def bypass_identities(root: nn.Module, graph: fx.Graph) -> None:
    """Let the readers of an ``nn.Identity`` read its input: some networks keep one behind each batch norm."""
    for node in list(graph.nodes):
        module = module_of(root, node)
        if type(module) is nn.Identity and not has_hooks(module) and node.all_input_nodes:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def fuse_batch_norms(root: nn.Module, graph: fx.Graph) -> None:
    """Replace each ``nn.BatchNorm2d`` by a ``BatchNormAct2d`` that takes in what follows it.

    That is an activation, or the sum with a residual and an activation. A batch norm that is called
    in several places takes in nothing, and one with hooks neither: they see its own output.
    """
    calls = count_calls(root, graph)
    for node in list(graph.nodes):
        module = module_of(root, node)
        if type(module) is not nn.BatchNorm2d:
            continue
        alone = calls[id(module)] == 1 and not has_hooks(module)
        tail = _tail(root, node) if alone else None
        activation = "none" if tail is None else tail[0]
        replace_module(root, module, BatchNormAct2d.from_float(module, activation=activation))
        # The residual is named even where there is none: a SyncBatchNorm put in the module's place, which
        # would drop activation and quantizer in silence, does not know the word.
        kwargs = {**node.kwargs, "residual": None if tail is None else tail[2]}
        if tail is None:
            node.kwargs = kwargs
        else:
            _take_in(graph, node, tail[1], kwargs)
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


def _take_in(graph: fx.Graph, node: fx.Node, end: fx.Node, kwargs: dict[str, Any]) -> None:
    with graph.inserting_before(end):
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
    if module is not None and not has_hooks(module):
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
    if operation_of(node) in _RELU:
        return "relu"
    return "relu6" if operation_of(node) in _RELU6 else None


def _residual(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """Return the other operand if ``node`` adds a tensor to ``operand``."""
    if operation_of(node) not in _ADD or node.kwargs or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not operand]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of the tree where ``old`` stands."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
