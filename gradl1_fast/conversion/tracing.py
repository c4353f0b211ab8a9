"""Traces a whole model: its graphs, and the layers that share a site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from gradl1_fast.conversion.graphs import changes_in_place, kind_of, layer_of, module_of, operation_of
from gradl1_fast.conversion.trace import Traced, is_leaf, trace
from gradl1_fast.conversion.unchanged import NotTraceableError
from gradl1_fast.nn.convertible import is_holder
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sharing import join

# Operations that return all values of a tensor in another shape or order; see gradl1_fast.nn.inputs.
_SAME_VALUES = {
    *("channel_shuffle", "clone", "contiguous", "detach", "flatten", "flip", "moveaxis", "movedim"),
    *("permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "reshape", "reshape_as", "roll", "rot90"),
    *("squeeze", "swapaxes", "swapdims", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as"),
}
_SAME_VALUES_MODULES = (nn.Flatten, nn.Identity, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)

# Operations that compute, although they may leave image data unchanged, such as a ReLU of pixels.
_COMPUTES = {
    *("abs", "clamp", "clampmax", "clampmin", "clip", "hardtanh", "leakyrelu", "maximum"),
    *("minimum", "prelu", "relu", "relu6", "threshold"),
    *(f"{kind}pool{n}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for n in (1, 2, 3)),
}

__all__ = ["Part", "parts_of", "share_sites"]


@dataclass(frozen=True)
class Part:
    """A container, with its graph or the reason why it could not be traced.

    Attributes:
        name: path in the model; empty for the model itself.
        container: the module.
        traced: the graph; None if there is a reason.
        reason: why the container could not be traced.
    """

    name: str
    container: nn.Module
    traced: Traced | None
    reason: str = ""


def parts_of(model: nn.Module, name: str = "") -> Iterator[Part]:
    """Trace a model. Where tracing fails, trace the children instead, recursively; also trace untraced parts.

    Only containers of this library's layers are traced.
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
    for path in traced.untraced:
        yield from parts_of(model.get_submodule(path), f"{name}.{path}".removeprefix("."))


def share_sites(model: nn.Module, parts: Iterable[Part]) -> None:
    """Make layers with the same input tensor share a site, where the traced parts of the model show it."""
    if isinstance(model, QuantizedLayer):
        if model.input_quantizer is not None:
            model.input_quantizer.is_input = model.input_quantizer.is_known = True
        return
    for part in parts:
        if part.traced is not None:
            _share(part.container, part.traced.graph, is_root=part.container is model)


def _share(root: nn.Module, graph: fx.Graph, *, is_root: bool) -> None:
    modified = {
        _past_identities(root, node.all_input_nodes[0])
        for node in graph.nodes
        if _changes_its_input(root, node)
    }
    leaders: dict[fx.Node, QuantizedLayer] = {}
    kinds_of: defaultdict[ActivationQuantizer, set[str]] = defaultdict(set)  # the kinds of input of each site
    for node in graph.nodes:
        layer = layer_of(root, node)
        if layer is None or layer.input_quantizer is None or not node.all_input_nodes:
            continue
        source = _past_identities(root, node.all_input_nodes[0])
        leader = leaders.setdefault(source, layer)
        if leader is not layer and source not in modified and leader.input_quantizer is not None:
            join(layer, leader.input_quantizer)
        kinds_of[layer.input_quantizer].add(_kind_of(root, source, is_root=is_root))
    for quantizer, site_kinds in kinds_of.items():
        quantizer.is_known = True
        quantizer.is_input = site_kinds == {"input"}
        quantizer.is_mixed = "input" in site_kinds and len(site_kinds) > 1
        quantizer.is_computed = site_kinds == {"computed"}


def _past_identities(root: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node whose tensor a node returns unchanged in every mode."""
    while type(module_of(root, node)) is nn.Identity and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _origin(root: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node whose values a node returns in another shape or order."""
    while node.all_input_nodes:
        module, operation = module_of(root, node), operation_of(node)
        name = getattr(operation, "__name__", operation)
        if not isinstance(module, _SAME_VALUES_MODULES) and name not in _SAME_VALUES:
            break
        node = node.all_input_nodes[0]
    return node


def _kind_of(root: nn.Module, node: fx.Node, *, is_root: bool) -> str:
    """Return ``"input"``, ``"computed"``, or ``"unknown"`` if a tensor may hold the values of the input."""
    origin = _origin(root, node)
    if is_root and origin.op == "placeholder":
        return "input"
    return "computed" if kind_of(root, origin).lower().replace("_", "") in _COMPUTES else "unknown"


def _changes_its_input(root: nn.Module, node: fx.Node) -> bool:
    return bool(node.all_input_nodes) and changes_in_place(root, node)
