"""Conversion of a float model: layers replaced and fused, quantizers placed, weights shared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import fx, nn

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.nn.graphs import module_of
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.placement import LAYERS, place_layers, place_quantizers
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.report import unconverted_layers
from gradl1_fast.nn.rewrite import bypass_identities, fuse_batch_norms, remove_in_place, replace_module
from gradl1_fast.nn.trace import NotTraceableError, Tracer, has_own_forward, trace
from gradl1_fast.nn.twins import copy_structure

__all__ = ["convert"]


def convert(model: nn.Module, *, per_channel: bool = False) -> nn.Module:
    """Return the model with layers that can be penalised and quantized on demand.

    By ``torch.fx``: convolutions and linear layers become ``QConv*`` and ``QLinear``, batch norms
    take in the residual sum and the ReLU or ReLU6 behind them, and each distinct activation tensor
    that feeds a convolution or linear layer gets one quantizer at its producer. Every width is
    float at first: outputs and gradients equal the original's.

    The result shares parameters and buffers with ``model``, which stays as it is, so an optimizer
    made for one serves the other. State dicts have the same keys. A model that is already
    converted is returned unchanged. The result is a ``torch.fx.GraphModule``: methods of the
    original's class other than ``forward`` are not part of it.

    Args:
        model: any module, in any mode and on any device.
        per_channel: quantize each weight with one range for each output channel.

    Returns:
        The converted model. If the forward pass cannot be traced, a copy of the original in which
        each layer quantizes its own input; a warning says why, and such a model counts a tensor
        once for each layer it feeds, and its input as an activation.

    Raises:
        TypeError: it is no module.
        ValueError: the model has no convolution and no linear layer, it has plain layers beside layers of
            this library, or a layer that is lazy and has no weight yet.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> model = gl.convert(plain)
        >>> [type(layer).__name__ for layer in model.children() if hasattr(layer, "weight")]
        ['QConv2d', 'QConv2d']
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(model(x), plain(x))  # float, as before
        True
        >>> model.state_dict().keys() == plain.state_dict().keys()
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradl1_fast.convert: the model must be a torch.nn.Module, got {model!r:.100}")
    if any(isinstance(m, QuantizedLayer | BatchNormAct2d) for m in model.modules()):
        _refuse_half_converted(model)
        return model
    _refuse_lazy(model)
    layer = LAYERS.get(type(model))
    if layer is not None and not has_own_forward(model):
        return _lone_layer(layer, model, per_channel)
    tree = copy_structure(model)
    try:
        converted = _by_graph(tree, per_channel)
    except NotTraceableError as reason:
        warnings.warn(
            f"gradl1_fast.convert: {type(model).__name__} cannot be traced ({reason}); every layer "
            "quantizes its own input and nothing is fused",
            stacklevel=2,
        )
        converted = _layer_by_layer(tree, per_channel)
    _check_layers(converted)
    return converted


def _refuse_half_converted(model: nn.Module) -> None:
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) in LAYERS and not isinstance(model, ConvertedModel)
    ]
    if plain:
        raise ValueError(
            f"gradl1_fast.convert: the model has layers of this library, and {', '.join(plain)} of torch.nn; "
            "convert the whole model at once, before parts of it"
        )


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(
                f"gradl1_fast.convert: {name or 'the model'} is lazy and has no weight yet; run a batch first"
            )


def _lone_layer(layer: type[QuantizedLayer], model: nn.Module, per_channel: bool) -> nn.Module:
    converted = layer.from_float(model, per_channel=per_channel)
    converted.input_quantizer = ActivationQuantizer(penalized=False).to(converted.weight)  # fed with data
    return converted.train(model.training)


def _by_graph(tree: nn.Module, per_channel: bool) -> nn.Module:
    graph = trace(tree)
    graph.owning_module = tree  # type: ignore[assignment]  # what is impure depends on the modules called
    remove_in_place(tree, graph)
    graph.eliminate_dead_code(lambda node: node.is_impure() or _leaves_a_trace(tree, node))
    bypass_identities(tree, graph)
    fuse_batch_norms(tree, graph)
    place_layers(tree, graph, per_channel)
    place_quantizers(tree, graph)
    graph.lint()
    return ConvertedModel.assemble(tree.__dict__, graph, type(tree).__name__)


def _leaves_a_trace(tree: nn.Module, node: fx.Node) -> bool:
    """Return whether a call matters even if nobody reads its result: statistics, random numbers."""
    module = module_of(tree, node)
    return isinstance(module, nn.modules.dropout._DropoutNd) or (
        module is not None and any(True for _ in module.buffers())
    )


def _layer_by_layer(tree: nn.Module, per_channel: bool) -> nn.Module:
    for module in list(_own_modules(tree)):
        if has_own_forward(module):
            continue
        layer = LAYERS.get(type(module))
        if layer is not None:
            new = layer.from_float(module, per_channel=per_channel)
            replace_module(tree, module, new.train(module.training))
        elif type(module) is nn.BatchNorm2d:
            replace_module(tree, module, BatchNormAct2d.from_float(module))
    return tree


def _own_modules(tree: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules, but not what is inside others of torch.nn, which may read weights themselves."""
    yield tree
    tracer, containers = Tracer(), (nn.ModuleList, nn.ModuleDict)
    if isinstance(tree, containers) or not tracer.is_leaf_module(tree, ""):
        for child in tree.children():
            yield from _own_modules(child)


def _check_layers(model: nn.Module) -> None:
    """Warn about layers that were left as they are; refuse a model in which nothing was replaced."""
    left = unconverted_layers(model)
    if left:
        warnings.warn(
            "gradl1_fast.convert: left in float and out of the penalty, being subclasses, parametrized, "
            "of another kind, inside another module of torch.nn, or called as functions: " + ", ".join(left),
            stacklevel=3,
        )
    if not any(isinstance(m, QuantizedLayer) for m in model.modules()):
        raise ValueError("gradl1_fast.convert: the model has no convolution or linear layer to convert")
