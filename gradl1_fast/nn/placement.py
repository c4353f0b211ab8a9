"""Where quantizers go: one for each distinct activation tensor that feeds a convolution or linear layer."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.graphs import count_calls, module_of, operation_of
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QLinear, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.rewrite import replace_module

CONTAINER = "activation_quantizers"
LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    layer.twin: layer for layer in (QConv1d, QConv2d, QConv3d, QLinear)
}

# Operations that hand on the values of their input: a quantizer stands at the source of the values.
_SAME_VALUES = {
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    "contiguous",
    "flatten",
    "reshape",
    "squeeze",
    "unsqueeze",
    "view",
}


def place_layers(root: nn.Module, graph: fx.Graph, per_channel: bool) -> None:
    """Replace the convolutions and linear layers that the graph calls; the graph quantizes their inputs."""
    for node in graph.nodes:
        module = module_of(root, node)
        layer = None if module is None else LAYERS.get(type(module))
        if module is not None and layer is not None:
            new = layer.from_float(module, per_channel=per_channel, quantize_input=False)
            replace_module(root, module, new)


def place_quantizers(root: nn.Module, graph: fx.Graph) -> None:
    """Put a quantizer behind each tensor that feeds a layer; every reader then sees the quantized tensor."""
    calls = count_calls(root, graph)
    readers: dict[fx.Node, QuantizedLayer] = {}
    for node in graph.nodes:
        layer = module_of(root, node)
        if isinstance(layer, QuantizedLayer):
            readers.setdefault(source_of(root, node.all_input_nodes[0]), layer)
    for source, layer in readers.items():
        quantizer = ActivationQuantizer(penalized=source.op != "placeholder").to(layer.weight)
        _place(root, graph, source, quantizer.train(root.training), calls)


def _place(
    root: nn.Module, graph: fx.Graph, source: fx.Node, quantizer: ActivationQuantizer, calls: Counter[int]
) -> None:
    producer = module_of(root, source)
    if isinstance(producer, BatchNormAct2d) and calls[id(producer)] == 1:
        producer.quantizer = quantizer
        return
    if CONTAINER not in root._modules:
        root.add_module(CONTAINER, nn.Module().train(root.training))
    container = root.get_submodule(CONTAINER)
    name = f"{source.name}_output" if hasattr(container, source.name) else source.name
    container.add_module(name, quantizer)
    after = _last_placeholder(graph) if source.op == "placeholder" else source
    with graph.inserting_after(after):
        node = graph.call_module(f"{CONTAINER}.{name}", (source,))
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def source_of(root: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node whose values ``node`` hands on."""
    while operation_of(node) in _SAME_VALUES or isinstance(module_of(root, node), nn.Flatten | nn.Identity):
        node = node.all_input_nodes[0]
    return node
