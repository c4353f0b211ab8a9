"""The penalised activations of a plain network as outputs of it, or as additional inputs."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

__all__ = ["collecting", "displaced", "shapes"]


def collecting(model: nn.Module) -> fx.GraphModule:
    """Return the model, its parameters shared, with a second output: the list of penalised activations."""
    traced = fx.symbolic_trace(model)
    output = next(node for node in traced.graph.nodes if node.op == "output")
    output.args = ((output.args[0], _sites(traced)),)
    traced.recompile()
    return traced


def displaced(model: nn.Module) -> fx.GraphModule:
    """Return the model with a further argument for each penalised activation, which is added to it.

    The derivative with respect to that argument, at zero, is the derivative with respect to the activation.
    """
    traced = fx.symbolic_trace(model)
    graph = traced.graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    for place, site in reversed(list(enumerate(_sites(traced)))):
        with graph.inserting_after(first):
            argument = graph.placeholder(f"displacement_{place}")
        users = list(site.users)
        with graph.inserting_after(site):
            moved = graph.call_function(operator.add, (site, argument))
        for user in users:
            user.replace_input_with(site, moved)
    graph.lint()
    traced.recompile()
    return traced


def shapes(model: nn.Module, x: Tensor) -> list[torch.Size]:
    """Return the shapes of the penalised activations."""
    with torch.no_grad():
        return [site.shape for site in collecting(model)(x)[1]]


def _sites(traced: fx.GraphModule) -> list[fx.Node]:
    """Return the distinct nodes that feed a convolution or linear layer, without the images."""
    modules = dict(traced.named_modules())

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d | nn.Linear)

    fed = dict.fromkeys(node.args[0] for node in traced.graph.nodes if is_layer(node))
    return [node for node in fed if isinstance(node, fx.Node) and node.op != "placeholder"]
