"""Activation checkpointing: parts of a network whose inside is computed again when the backward needs it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from gradl1_fast.conversion.graphs import changes_in_place, layer_of, module_of
from gradl1_fast.conversion.trace import trace
from gradl1_fast.conversion.unchanged import NotTraceableError
from gradl1_fast.nn.layers import QuantizedLayer

__all__ = ["recomputing"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def recomputing(model: nn.Module, parts: int | None = None) -> nn.Module:
    """Return a network with the same modules, which keeps the activations between its parts alone.

    What is inside a part is computed twice, without reentry, so that gradients of gradients are right,
    and with the same random numbers. Statistics of batch norms count each batch once. The first
    backward of a penalty needs all of it again at once: memory is saved in plain steps. Layers that share a
    site are in one part.

    Args:
        model: a converted model; it stays as it is, and shares its modules with the result.
        parts: how many at most; None for the square root of the number of operations.

    Raises:
        ValueError: the model cannot be traced, so that there is no graph to cut; the message says why.
    """
    try:
        graph = trace(model).graph
    except NotTraceableError as reason:
        raise ValueError(
            f"checkpointing needs a model whose forward pass can be traced, which failed: {reason}"
        ) from reason
    part_of = _parts(model, graph, parts)
    whole = fx.GraphModule(model, graph)
    cut = split_module(whole, model, lambda node: part_of.get(node, 0), keep_original_order=True)
    for name, part in list(cut.named_children()):
        setattr(cut, name, _Part(part))
    return cut


def _parts(model: nn.Module, graph: fx.Graph, parts: int | None) -> dict[fx.Node, int]:
    """Return the number of the part of each operation."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    length = math.ceil(len(calls) / (parts or round(math.sqrt(len(calls)))))
    uncut = _uncut(model, calls)
    numbers: dict[fx.Node, int] = {}
    number = start = 0
    for index, node in enumerate(calls):
        if index - start >= length and index not in uncut:
            number, start = number + 1, index
        numbers[node] = number
    return numbers


def _uncut(model: nn.Module, calls: list[fx.Node]) -> set[int]:
    """Return the operations before which no part may end.

    Layers that are given one tensor share what its site makes of it, which is made again with the part. A
    tensor that is changed in place would be changed twice if its part ended before that.
    """
    index_of = {node: index for index, node in enumerate(calls)}
    first: dict[int, int] = {}
    uncut: set[int] = set()
    for index, node in enumerate(calls):
        layer = layer_of(model, node)
        if layer is not None:
            uncut.update(range(first.setdefault(id(layer.input_quantizer), index) + 1, index + 1))
        if changes_in_place(model, node) and node.all_input_nodes:
            uncut.update(range(index_of.get(_origin(model, node.all_input_nodes[0]), index) + 1, index + 1))
    return uncut


def _origin(model: nn.Module, node: fx.Node) -> fx.Node:
    """Return what made the memory of a tensor: a layer or a batch norm; others may return a view."""
    while node.all_input_nodes and not isinstance(module_of(model, node), QuantizedLayer | _BatchNorm):
        node = node.all_input_nodes[0]
    return node


class _Part(nn.Module):
    """A part of a network, computed again when its inside is needed."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.inside, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _StatisticsKept(self.inside)


class _StatisticsKept:
    """Lets batch norms update copies of their running statistics, which are then thrown away.

    It can be entered again: gradients of gradients compute the activations once more. Nothing is written back
    to the statistics themselves, which a backward pass may hold.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._kept: list[list[dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._kept.append([dict(norm._buffers) for norm in self.norms])
        for norm in self.norms:
            for name, value in norm._buffers.items():
                norm._buffers[name] = None if value is None else value.clone()

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self.norms, self._kept.pop(), strict=True):
            norm._buffers.update(buffers)
