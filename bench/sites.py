"""The penalised activations of a plain network as outputs of it, or as additional inputs.

They are what convolutions and linear layers are given: a tensor that several of them read is one, the images
are none, and what goes past the layers is the tensor itself.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

__all__ = ["collecting", "displaced", "shapes"]


def collecting(model: nn.Module) -> fx.GraphModule:
    """Return the model, its parameters shared, with a second output: the list of penalised activations."""
    traced = fx.symbolic_trace(model)
    graph, seen = traced.graph, []
    for site, layers in _sites(traced).items():
        with graph.inserting_before(layers[0]):
            seen.append(graph.call_method("view_as", (site, site)))
        _give(layers, site, seen[-1])
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], seen),)
    graph.lint()
    traced.recompile()
    return traced


def displaced(model: nn.Module) -> fx.GraphModule:
    """Return the model with a further argument for each penalised activation, which is added to it.

    The derivative with respect to that argument, at zero, is the derivative with respect to the activation.
    """
    traced = fx.symbolic_trace(model)
    graph = traced.graph
    last = next(node for node in graph.nodes if node.op == "placeholder")
    for place, (site, layers) in enumerate(_sites(traced).items()):
        with graph.inserting_after(last):
            last = graph.placeholder(f"displacement_{place}")
        with graph.inserting_before(layers[0]):
            moved = graph.call_function(operator.add, (site, last))
        _give(layers, site, moved)
    graph.lint()
    traced.recompile()
    return traced


def shapes(model: nn.Module, x: Tensor) -> list[torch.Size]:
    """Return the shapes of the penalised activations."""
    with torch.no_grad():
        return [site.shape for site in collecting(model)(x)[1]]


def _sites(traced: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Return the calls of layers by the tensor that they are given, in order; without the images."""
    modules = dict(traced.named_modules())
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d | nn.Linear):
            readers.setdefault(node.all_input_nodes[0], []).append(node)
    return {site: layers for site, layers in readers.items() if site.op != "placeholder"}


def _give(layers: list[fx.Node], site: fx.Node, tensor: fx.Node) -> None:
    for layer in layers:
        layer.replace_input_with(site, tensor)
