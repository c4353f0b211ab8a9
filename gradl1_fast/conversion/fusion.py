"""Fuses a batch norm, the residual sum and the activation that follow it into one call of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from gradl1_fast.conversion.graphs import (
    ADDITIONS,
    activation_of,
    changes_in_place,
    layer_of,
    module_of,
    operation_of,
)

__all__ = ["fuse"]


def fuse(root: nn.Module, graph: fx.Graph, operation: Callable[..., Any]) -> None:
    """Replace each ``nn.BatchNorm2d`` of a graph by a call of ``operation``, fused with what follows.

    This is an activation, or the sum with a residual followed by an activation. ``operation`` takes the
    module, its input, the residual or None, the activation, and a layer whose site is the only reader of the
    result, or None.

    The fusion preserves the result of the graph: it requires that a tensor that is changed in place has no
    other reader, and moves no operation past an in-place operation.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    changes = [order[node] for node in graph.nodes if changes_in_place(root, node)]
    for node in list(graph.nodes):
        if type(module_of(root, node)) is not nn.BatchNorm2d or len(node.args) != 1 or node.kwargs:
            continue
        end, residual, activation = _tail(root, node)
        between = [i for i in changes if order[node] < i < order[end]]
        if residual is not None and any(i != order[_only_user(node)] for i in between):
            end, residual, activation = node, None, "none"
        _replace(root, graph, (node, end), residual, activation, operation)
    graph.lint()


def _tail(root: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
    """Return the last node of the fused operation, the residual or None, and the activation."""
    user = _only_user(node)
    if user is None:
        return node, None, "none"
    activation = activation_of(root, user)
    if activation is not None:
        return user, None, activation
    end, residual = _only_user(user), _residual(user, node)
    activation = None if end is None or residual is None else activation_of(root, end)
    return (node, None, "none") if end is None or activation is None else (end, residual, activation)


def _residual(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """Return the other operand if ``node`` adds a tensor to ``operand`` without changing another in place."""
    if operation_of(node) not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not operand]
    changed = "iadd" in str(node.target) or node.target == "add_"
    if len(others) != 1 or not isinstance(others[0], fx.Node) or (changed and node.args[0] is not operand):
        return None
    return others[0]


def _replace(
    root: nn.Module,
    graph: fx.Graph,
    ends: tuple[fx.Node, fx.Node],
    residual: fx.Node | None,
    activation: str,
    operation: Callable[..., Any],
) -> None:
    node, end = ends
    site = _only_site(root, end)
    with graph.inserting_before(end):
        names = [str(node.target), None if site is None else str(site.target)]
        modules = [None if name is None else graph.get_attr(name) for name in names]
        fused = graph.call_function(operation, (modules[0], node.args[0], residual, activation, modules[1]))
    end.replace_all_uses_with(fused)
    for old in (end, _only_user(node), node):
        if old is not None and old is not fused and not old.users and old in graph.nodes:
            graph.erase_node(old)


def _only_site(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return a call of a layer that reads ``node``, if all readers are layers of the same site."""
    layers = [layer_of(root, user) for user in node.users]
    sites = {id(None if layer is None else layer.input_quantizer) for layer in layers}
    alone = len(sites) == 1 and all(
        layer is not None and layer.input_quantizer is not None for layer in layers
    )
    return next(iter(node.users)) if alone else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
