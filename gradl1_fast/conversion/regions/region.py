"""A segment of a plan, which runs as a region if possible and node by node otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast import backends
from gradl1_fast._checks import is_traced_by_make_fx
from gradl1_fast.conversion.execution import fused
from gradl1_fast.conversion.regions.builder import Builder, parameters_of
from gradl1_fast.conversion.regions.node import run
from gradl1_fast.conversion.regions.nodes import emit, layer_in, modules_in
from gradl1_fast.conversion.regions.partition import Segment, segments
from gradl1_fast.conversion.regions.passes import NotFittingError
from gradl1_fast.conversion.regions.program import Program
from gradl1_fast.nn.arming import Arming
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sharing import pass_through

__all__ = ["Region", "executable"]

_CACHE_SIZE = 8  # cached programs, one per combination of shapes and states


def executable(root: nn.Module, graph: fx.Graph, arming: Arming) -> tuple[Callable[..., Any], list[Region]]:
    """Return a function that computes a container's graph, and the regions of the graph.

    The function takes the arguments of the container that have no default.

    Args:
        root: the container.
        graph: the graph of its forward pass.
        arming: the arming state of the model.
    """
    graph = fused(root, graph)
    regions = _put_regions(root, graph, arming)
    return fx.GraphModule(root, graph).forward, regions


def _put_regions(root: nn.Module, graph: fx.Graph, arming: Arming) -> list[Region]:
    """Replace the segments of a graph by calls of regions, and return the regions."""
    parts = segments(root, graph)
    regions = [Region(root, segment, arming) for segment in parts]
    replaced: dict[fx.Node, fx.Node] = {}
    for segment, region in zip(parts, regions, strict=True):
        _replace(graph, segment, region, replaced)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return regions


def _replace(graph: fx.Graph, segment: Segment, region: Region, replaced: dict[fx.Node, fx.Node]) -> None:
    """Replace the nodes of a segment by a call of its region; ``replaced`` maps old nodes to new ones."""
    with graph.inserting_after(segment.nodes[-1]):
        call = graph.call_function(_called(region), tuple(replaced.get(n, n) for n, _ in segment.inputs))
    position = call
    for i, node in enumerate(segment.outputs):
        with graph.inserting_after(position):
            position = replaced[node] = graph.call_function(_item, (call, i))
        node.replace_all_uses_with(position, delete_user_cb=lambda user: user not in segment.nodes)
    for node in reversed(segment.nodes):
        graph.erase_node(node)


def _called(region: Region) -> Callable[..., Any]:
    def call_region(*inputs: Tensor) -> Any:  # fx calls functions, not objects
        return region(*inputs)

    return call_region


def _item(values: list[Tensor], index: int) -> Tensor:
    return values[index]


class Region:
    """Computes a segment of a container's graph.

    Args:
        root: the container of the graph.
        segment: the nodes.
        arming: the arming state of the model.

    Attributes:
        reason: why the last call ran node by node; empty if it ran as a region.
        layers: the number of layers in the region.
        name: the names of the first and the last operation.
    """

    def __init__(self, root: nn.Module, segment: Segment, arming: Arming) -> None:
        self.reason = ""
        ends = [str(n.target) if n.op == "call_module" else n.name for n in segment.nodes]
        self.name = ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"
        self._root, self._arming = root, arming
        self._layers: list[Any] = [layer for _, layer in segment.inputs]
        self._graph = _own_graph(root, segment)
        self._nodes = [
            node for node in self._graph.nodes if node.op in ("call_module", "call_function", "call_method")
        ]
        self._modules = [m for node in self._nodes for m in modules_in(root, node)]
        self.layers = sum(isinstance(m, QuantizedLayer) for m in self._modules)
        self._parameters = parameters_of(self._modules)
        self._by_nodes: Callable[..., Any] | None = None
        self._programs: dict[Any, _Entry | str] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the outputs of the segment."""
        self.reason = _why_not(tensors)
        if not self.reason:
            args = [self._argument(module, name) for module, name in self._parameters]
            inputs = [
                x if layer is None else pass_through(layer, x)
                for x, layer in zip(tensors, self._layers, strict=True)
            ]
            kind = inputs[0].device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            try:
                return self._run(self._program(inputs, args, dtype), inputs, args, dtype)
            except NotFittingError as reason:
                self.reason = self._programs[self._key(inputs, args, dtype)] = str(reason)
        return self._run_nodes(*tensors)

    def _argument(self, module: nn.Module, name: str) -> Tensor:
        value: Any = module._parameters[name]
        return module._quantized(value) if name == "weight" and isinstance(module, QuantizedLayer) else value

    def _run(
        self, entry: _Entry, inputs: list[Tensor], args: list[Tensor], dtype: torch.dtype | None
    ) -> list[Tensor]:
        program, quantizers = entry
        probes = [quantizer.probe for quantizer in quantizers]
        if dtype is None:
            return run(program, self._arming, inputs, args, probes)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return run(program, self._arming, inputs, args, probes)

    def _program(self, inputs: list[Tensor], args: list[Tensor], dtype: torch.dtype | None) -> _Entry:
        """Return the program for these tensors in the current state of the modules.

        Raises:
            NotFittingError: the tensors do not fit a region.
        """
        key = self._key(inputs, args, dtype)
        entry = self._programs.get(key)
        if entry is None:
            entry = self._build(inputs, args, dtype)
            key = self._key(inputs, args, dtype)  # building may have joined sites
            if len(self._programs) >= _CACHE_SIZE:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = entry
        if isinstance(entry, str):
            raise NotFittingError(entry)
        return entry

    def _key(self, inputs: list[Tensor], args: list[Tensor], dtype: torch.dtype | None) -> Any:
        return (
            tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (*inputs, *args)]),
            tuple(map(_state, self._modules)),
            (dtype, backends.chosen_by_name(), torch.is_grad_enabled()),
        )

    def _build(self, inputs: list[Tensor], args: list[Tensor], dtype: torch.dtype | None) -> _Entry | str:
        requires_grad = [t.requires_grad for t in (*inputs, *args)]
        indices = {(id(module), name): i for i, (module, name) in enumerate(self._parameters)}
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        (outputs,) = next(reversed(self._graph.nodes)).args
        builder = Builder(
            placeholders, indices, requires_grad, dtype, _users(self._root, self._nodes, outputs)
        )
        try:
            for node in self._nodes:
                emit(self._root, node, builder)
            return builder.program(outputs), builder.probes
        except NotFittingError as reason:
            return str(reason)

    def _run_nodes(self, *tensors: Tensor) -> Any:
        if self._by_nodes is None:
            self._by_nodes = fx.GraphModule(self._root, self._graph).forward
        return self._by_nodes(*tensors)


_Entry = tuple[Program, list[ActivationQuantizer]]


def _own_graph(root: nn.Module, segment: Segment) -> fx.Graph:
    """Return the segment as a separate graph, with a placeholder for each input."""
    graph = fx.Graph()
    inputs = {
        (source, id(layer)): graph.placeholder(f"x{i}") for i, (source, layer) in enumerate(segment.inputs)
    }
    copies: dict[fx.Node, fx.Node] = {}
    for node in segment.nodes:
        layer = layer_in(root, node)

        def argument(source: fx.Node, layer: Any = layer) -> fx.Node:
            if source.op == "get_attr":
                return graph.get_attr(str(source.target))
            return copies[source] if source in copies else inputs[source, id(layer)]

        copies[node] = graph.node_copy(node, argument)
    graph.output(tuple(copies[node] for node in segment.outputs))
    return graph


def _users(
    root: nn.Module, nodes: list[fx.Node], outputs: Any
) -> dict[fx.Node, tuple[list[QuantizedLayer], bool]]:
    """Return the layers that read each node, and whether anything else reads it."""
    users: dict[fx.Node, tuple[list[QuantizedLayer], bool]] = {}
    for node in nodes:
        layers = [layer_in(root, user) for user in node.users]
        others = node in outputs or any(layer is None for layer in layers)
        users[node] = [layer for layer in layers if layer is not None], others
    return users


def _state(module: Any) -> Any:
    """Return the state of a module that a program depends on, besides its parameters."""
    own: Any = module
    if isinstance(module, QuantizedLayer):
        quantizer: Any = module._modules.get("input_quantizer")
        site = None if quantizer is None else (id(quantizer), quantizer.state)
        if isinstance(own, nn.Linear):
            return site
        return site, own.stride, own.padding, own.dilation, own.groups, own.padding_mode
    return module.training, own.eps, own.track_running_stats, module._buffers.get("running_mean") is None


def _why_not(tensors: tuple[Tensor, ...]) -> str:
    """Return why a region cannot process these tensors, or an empty string."""
    for x in tensors:
        if type(x) not in (Tensor, nn.Parameter) or x.is_inference() or x.layout is not torch.strided:
            return "was given a tensor subclass, or an inference or non-strided tensor"
        if not x.is_floating_point() or x.device.type not in ("cpu", "cuda"):
            return "was given a tensor that is not floating-point, or on a device other than CPU and CUDA"
    if is_traced_by_make_fx():
        return "was traced by make_fx"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "ran under saved-tensor hooks, such as those of activation checkpointing"
    return ""
