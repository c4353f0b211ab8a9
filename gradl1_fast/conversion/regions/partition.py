"""Partitions a graph into the segments that become regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from gradl1_fast.conversion.graphs import layer_of, may_return_input, module_of
from gradl1_fast.conversion.regions.nodes import inputs_of, layer_in, modules_in, shares_memory, supports
from gradl1_fast.conversion.trace import is_leaf
from gradl1_fast.penalty.checks.distributed import is_distributed

__all__ = ["Segment", "segments"]

# The parameters of a region get their gradients together. With several processes, a limit lets their
# all-reduce overlap with the backward passes of earlier regions. It is the bucket size of
# DistributedDataParallel.
_BUCKET = 25 * 2**20


@dataclass
class Segment:
    """Consecutive nodes that one region computes.

    Attributes:
        nodes: the nodes, in order.
        inputs: the nodes outside of the segment that it reads, each with the layer that reads it, or None.
        outputs: the nodes of the segment that are read outside of it.
    """

    nodes: list[fx.Node]
    inputs: list[tuple[fx.Node, nn.Module | None]] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def segments(root: nn.Module, graph: fx.Graph) -> list[Segment]:
    """Return the segments of a graph of fused operations, in execution order."""
    cuts: set[fx.Node] = set()
    while True:
        result = [Segment(nodes) for nodes in _runs(root, graph, cuts)]
        cut = next((node for segment in result for node in _conflicts(root, segment)), None)
        if cut is None:
            break
        cuts.add(cut)
    for segment in result:
        _find_ends(root, segment)
    return result


def _runs(root: nn.Module, graph: fx.Graph, cuts: set[fx.Node]) -> Iterator[list[fx.Node]]:
    run: list[fx.Node] = []
    inside: set[fx.Node] = set()
    size, limit = 0, _limit()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        added = sum(
            p.numel() * p.element_size() for m in modules_in(root, node) for p in m.parameters(recurse=False)
        )
        if run and (node in cuts or size + added > limit or not supports(root, node, inside)):
            yield run
            run, inside, size = [], set(), 0
        if supports(root, node, inside):
            run.append(node)
            inside.add(node)
            size += added
    if run:
        yield run


def _limit() -> float:
    several = is_distributed() and torch.distributed.get_world_size() > 1
    return _BUCKET if several else float("inf")


def _conflicts(root: nn.Module, segment: Segment) -> Iterator[fx.Node]:
    """Yield the nodes that must not be in the same segment as their inputs.

    These are layers that may share their site with a layer outside of the segment, since sites are joined by
    the identity of a tensor outside; and nodes that return a view of a tensor that is also read outside,
    where it may be changed in place.
    """
    inside = set(segment.nodes)
    for node in segment.nodes:
        if may_return_input(root, node) and _is_read_twice(root, node):
            yield node
        if shares_memory(root, node) and any(_is_read_outside(n, inside) for n in (node, *inputs_of(node))):
            yield node
        if layer_in(root, node) is not None and node.args[0] in inside:
            outside = [user for user in node.args[0].users if user not in inside]  # type: ignore[union-attr]
            if any(_may_hold_a_layer(root, user) for user in outside):
                yield node


def _is_read_twice(root: nn.Module, node: fx.Node) -> bool:
    """Return whether layers read both the result of a node and its input, which may be the same tensor."""
    others = [user for source in inputs_of(node) for user in source.users if user is not node]
    return all(any(_may_hold_a_layer(root, user) for user in users) for users in (node.users, others))


def _is_read_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    return node in inside and any(user not in inside for user in node.users)


def _may_hold_a_layer(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node may pass a tensor that it reads unchanged to a layer."""
    if may_return_input(root, node) and any(_may_hold_a_layer(root, user) for user in node.users):
        return True
    module = module_of(root, node)
    if module is not None:
        return layer_of(root, node) is not None or not is_leaf(module)
    return node.op == "output"


def _find_ends(root: nn.Module, segment: Segment) -> None:
    inside = set(segment.nodes)
    seen = set()
    for node in segment.nodes:
        layer = layer_in(root, node)
        for source in inputs_of(node):
            key = source, id(layer)
            if source not in inside and key not in seen:
                seen.add(key)
                segment.inputs.append((source, layer))
        if any(user not in inside for user in node.users):
            segment.outputs.append(node)
