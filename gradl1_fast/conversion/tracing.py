"""What tracing tells of a whole model: its graphs, and which layers share a site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from gradl1_fast.conversion.graphs import changes_in_place, kind_of, layer_of, module_of, operation_of
from gradl1_fast.conversion.trace import Traced, is_holder, is_leaf, trace
from gradl1_fast.conversion.unchanged import NotTraceableError
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sharing import join

# What hands on the values of a tensor, all of them, in another shape or order; see gradl1_fast.nn.inputs.
_SAME_VALUES = {
    *("channel_shuffle", "clone", "contiguous", "detach", "flatten", "flip", "moveaxis", "movedim"),
    *("permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "reshape", "reshape_as", "roll", "rot90"),
    *("squeeze", "swapaxes", "swapdims", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as"),
}
_SAME_VALUES_MODULES = (nn.Flatten, nn.Identity, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)

# What computes, though data in the right range come out as they went in: those of pictures are not negative.
_COMPUTES = {
    *("abs", "clamp", "clampmax", "clampmin", "clip", "hardtanh", "leakyrelu", "maximum"),
    *("minimum", "prelu", "relu", "relu6", "threshold"),
    *(f"{kind}pool{n}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for n in (1, 2, 3)),
}

__all__ = ["Part", "parts_of", "share_sites"]


@dataclass(frozen=True)
class Part:
    """A container that could be traced, or the reason why not.

    Attributes:
        name: path in the model; empty for the model itself.
        container: the module.
        traced: its graph; None where there is a reason.
        reason: why it could not be traced.
    """

    name: str
    container: nn.Module
    traced: Traced | None
    reason: str = ""


def parts_of(model: nn.Module, name: str = "") -> Iterator[Part]:
    """Trace a model; where that fails its children, and so on down; also what is kept whole inside a graph.

    Only containers that hold layers of this library are tried.
    """
    if is_leaf(model) or not any(isinstance(m, QuantizedLayer) for m in model.modules()):
        return
    try:
        traced = trace(model)
    except NotTraceableError as reason:
        if not is_holder(model) or isinstance(model, nn.Sequential):
            yield Part(name, model, None, str(reason))
        for child_name, child in model.named_children():
            yield from parts_of(child, f"{name}.{child_name}".removeprefix("."))
        return
    yield Part(name, model, traced)
    for path in traced.kept_whole:
        yield from parts_of(model.get_submodule(path), f"{name}.{path}".removeprefix("."))


def share_sites(model: nn.Module) -> None:
    """Let layers that are given the very same tensor share a site, as far as tracing shows it."""
    if isinstance(model, QuantizedLayer):
        if model.input_quantizer is not None:
            model.input_quantizer.is_input = model.input_quantizer.is_known = True
        return
    for part in parts_of(model):
        if part.traced is not None:
            _share(part.container, part.traced.graph, is_root=part.container is model)


def _share(root: nn.Module, graph: fx.Graph, *, is_root: bool) -> None:
    changed = {
        _past_identities(root, node.all_input_nodes[0])
        for node in graph.nodes
        if _changes_its_input(root, node)
    }
    first: dict[fx.Node, QuantizedLayer] = {}
    given: defaultdict[ActivationQuantizer, set[str]] = defaultdict(set)  # what each site is given
    for node in graph.nodes:
        layer = layer_of(root, node)
        if layer is None or layer.input_quantizer is None or not node.all_input_nodes:
            continue
        source = _past_identities(root, node.all_input_nodes[0])
        leader = first.setdefault(source, layer)
        if leader is not layer and source not in changed and leader.input_quantizer is not None:
            join(layer, leader.input_quantizer)
        given[layer.input_quantizer].add(_kind_of(root, source, is_root=is_root))
    for quantizer, kinds in given.items():
        quantizer.is_known = True
        quantizer.is_input = kinds == {"input"}
        quantizer.is_mixed = "input" in kinds and len(kinds) > 1
        quantizer.is_computed = kinds == {"computed"}


def _past_identities(root: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node whose very tensor a node hands on, whatever the mode."""
    while type(module_of(root, node)) is nn.Identity and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _origin(root: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node whose values a node hands on in another shape or order."""
    while node.all_input_nodes:
        module, operation = module_of(root, node), operation_of(node)
        name = getattr(operation, "__name__", operation)
        if not isinstance(module, _SAME_VALUES_MODULES) and name not in _SAME_VALUES:
            break
        node = node.all_input_nodes[0]
    return node


def _kind_of(root: nn.Module, node: fx.Node, *, is_root: bool) -> str:
    """Return whether a tensor is the network's input, is computed, or has values that may be the input's."""
    origin = _origin(root, node)
    if is_root and origin.op == "placeholder":
        return "input"
    return "computed" if kind_of(root, origin).lower().replace("_", "") in _COMPUTES else "unknown"


def _changes_its_input(root: nn.Module, node: fx.Node) -> bool:
    return bool(node.all_input_nodes) and changes_in_place(root, node)
