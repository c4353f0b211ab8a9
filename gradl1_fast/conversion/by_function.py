"""Finds, by tracing, weights that a function reads without a call of their layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gradl1_fast.conversion.graphs import kind_of
from gradl1_fast.conversion.tracing import Part
from gradl1_fast.nn.sites import named_layers

__all__ = ["used_by_function"]


def used_by_function(model: nn.Module, parts: Iterable[Part]) -> dict[int, str]:
    """Return the operation that reads the weight of an uncalled layer, by the identity of the layer.

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


def _attribute(root: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name, None)
