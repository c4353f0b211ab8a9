"""Finds, by tracing, weights that a function reads without a call of their layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from gradl1_fast.conversion.graphs import kind_of, layer_of
from gradl1_fast.conversion.tracing import Part, parts_of
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers

__all__ = ["only_by_function", "quantizable_layers", "used_by_function"]


def used_by_function(model: nn.Module, parts: Iterable[Part]) -> dict[int, str]:
    """Return the operation that reads the weight of a layer, by the identity of the layer.

    Args:
        model: a converted model.
        parts: its traced parts.
    """
    owners = {id(layer.weight): layer for layer in named_layers(model).values()}
    used: dict[int, str] = {}
    for part in parts:
        for node in [] if part.traced is None else part.traced.graph.nodes:
            value = _attribute(part.container, str(node.target)) if node.op == "get_attr" else None
            owner = owners.get(id(value))
            if owner is not None and node.users:
                used[id(owner)] = kind_of(part.container, next(iter(node.users)))
    return used


def only_by_function(model: nn.Module, parts: Sequence[Part]) -> dict[str, str]:
    """Return the operation that reads the weight, by the name of each layer that is never called."""
    traced = [(part.container, part.traced.graph) for part in parts if part.traced is not None]
    called = {id(layer_of(container, node)) for container, graph in traced for node in graph.nodes}
    used = {key: kind for key, kind in used_by_function(model, parts).items() if key not in called}
    layers = named_layers(model).items()
    return {name: used[id(m)] for name, m in layers if id(m) in used and not m.was_called}


def quantizable_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers by name, without those whose weight stays in float because only functions read it."""
    in_float = only_by_function(model, list(parts_of(model)))
    return {name: layer for name, layer in named_layers(model).items() if name not in in_float}


def _attribute(root: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name, None)
