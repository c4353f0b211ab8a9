"""Checks an autograd graph for nodes that silently break double backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = [
    "OTHER_SCALE",
    "WHY_NOT_REACHED",
    "Graph",
    "freed_graph_explained",
    "look",
    "nodes_of",
    "refuse_clamped",
    "refuse_cut_region",
    "refuse_other_scale",
    "refuse_reentrant_checkpoint",
    "refuse_static_graph",
    "refuse_width",
    "require_gradients",
]

WHY_NOT_REACHED = (
    "Was the penalty created after this forward pass, or for a model other than the one called? If not, the "
    "loss does not depend on them, or something cuts the graph in between (detach, no_grad)"
)
OTHER_SCALE = (
    "GradL1: another penalty with a different scale was created for this model before this forward pass "
    "({}); re-create this penalty, then rerun the forward pass"
)

_COMPILED = (
    "GradL1: a region of torch.compile that ends before the penalty contributes to the loss, and it has no "
    "second derivative; compile loss and penalty together, with fullgraph=True and "
    "torch._dynamo.config.trace_autograd_ops = True"
)
_SCALED = "_ScaleProbeBackward"
_FREED = (
    "GradL1: a backward pass has freed the graph of this loss, or of a tensor in it from an earlier step; "
    "call .backward() once, on loss + penalty(loss), and detach what is carried from step to step"
)


@dataclass(frozen=True)
class Graph:
    """The result of a walk over the graph of a loss.

    Attributes:
        functions: the nodes of custom functions that are not part of this library.
        users: for each searched tensor, by name, the nodes that read it.
    """

    functions: list[Any]
    users: dict[str, list[Any]]


def look(loss: Tensor, tensors: Mapping[str, Tensor]) -> Graph:
    """Walk once over the graph of ``loss``.

    Args:
        loss: the loss, with its graph.
        tensors: the tensors to search for, by name; leaves, or tensors passed by ``functional_call``.

    Raises:
        RuntimeError: a region of ``torch.compile`` contributes to the loss. Its backward ends in a node
            that raises, which ``autograd.grad`` does not visit.
    """
    leaves = {id(tensor): name for name, tensor in tensors.items() if tensor.is_leaf}
    inner = {(t.grad_fn, t.output_nr): name for name, t in tensors.items() if not t.is_leaf}
    graph = Graph([], {name: [] for name in tensors})
    is_foreign: dict[type, bool] = {}  # a graph has thousands of nodes of few types
    for node, parents in nodes_of([loss]):
        kind = type(node)
        if kind not in is_foreign:
            is_foreign[kind] = _is_foreign(kind)
        if is_foreign[kind]:
            graph.functions.append(node)
        for edge in parents:
            name = leaves.get(id(getattr(edge[0], "variable", None)))
            if name is None and inner:
                name = inner.get(edge)
            if name is not None:
                graph.users[name].append(node)
    return graph


@contextlib.contextmanager
def freed_graph_explained() -> Iterator[None]:
    """Replace PyTorch's error about a freed graph, whose advice (``retain_graph``) does not apply here.

    Raises:
        RuntimeError: the graph of the loss was freed by an earlier backward pass.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(_FREED) from error


def refuse_clamped(graph: Graph, layers: Iterable[str]) -> None:
    """Raise if the weight of a layer reached the loss through a quantizer that clamps.

    Raises:
        RuntimeError: names the layer.
    """
    for name in layers:
        for node in graph.users[name]:
            if hasattr(node, "clamped_at"):
                refuse_width(name, node.clamped_at)


def refuse_reentrant_checkpoint(graph: Graph) -> None:
    """Raise if activations were checkpointed with ``use_reentrant=True``, which cuts the graph.

    Raises:
        RuntimeError: says what to use instead.
    """
    if any(node._forward_cls.__name__ == "CheckpointFunction" for node in graph.functions):
        raise RuntimeError(
            "GradL1: a part of the model is checkpointed with use_reentrant=True, so the gradient of the "
            "penalty would be lost; set use_reentrant=False"
        )


def refuse_static_graph(graph: Graph) -> None:
    """Raise if the model is wrapped in ``DistributedDataParallel(static_graph=True)``.

    In its first step it averages gradients when a backward pass ends: here the penalty's first one, which
    accumulates none. The ranks then differ without an error.

    Raises:
        RuntimeError: says what to use instead.
    """
    for node in graph.functions:
        is_sink = node._forward_cls.__name__ == "_DDPSink"
        if is_sink and getattr(node.ddp_weakref(), "static_graph", False):
            raise RuntimeError(
                "GradL1: DistributedDataParallel(static_graph=True) does not average the gradients of a step "
                "with two backward passes; set static_graph=False"
            )


def refuse_width(layer: str, bits: int) -> None:
    """Raise if the weight of a layer is clamped at a width, that is at 1 bit or in a stored range.

    At 1 bit half of the weights are outside of the range, and dL/dW is not the gradient that reaches the
    output.

    Raises:
        RuntimeError: names the layer.
    """
    layer = layer or "the layer"  # the model itself has no name
    if bits == 1:
        raise RuntimeError(f"GradL1: cannot penalise {layer} at 1 bit: use float or at least 2 bits")
    raise RuntimeError(
        f"GradL1: {layer} is quantized in a stored range, where its gradient stops at clamped weights; "
        "penalise weights in float, or without a stored range: "
        'gradl1_fast.calibrate_weights(model, ranges="min_max")'
    )


def refuse_other_scale(graph: Graph, site: str, current: int | None, expected: int | None) -> None:
    """Raise if an activation was measured for a penalty with another scale than this one.

    Args:
        graph: the graph of the loss.
        site: the name of the activation.
        current: the width of the steps that its quantizer measures now.
        expected: the width of the steps of this penalty; None without steps.

    Raises:
        RuntimeError: names the activation.
    """
    for node in graph.users[site]:
        if hasattr(node, "measured_at"):  # a region
            if node.measured_at != expected:
                raise RuntimeError(OTHER_SCALE.format(site))
            continue
        scaled = node.name() == _SCALED
        # With the backend "eager", torch.compile creates nodes without recorded widths.
        if (getattr(node, "step_bits", current) if scaled else None) != expected:
            raise RuntimeError(OTHER_SCALE.format(site))


def refuse_cut_region(loss: Tensor) -> None:
    """Raise, during compilation of a region, if the loss was computed at least partly outside of it.

    A region cannot differentiate earlier operations twice, and does not always raise.

    Raises:
        RuntimeError: says how to compile a step.
    """
    from torch._dynamo.comptime import comptime

    def look(context: Any) -> None:
        pending, seen = [context.get_local("loss").as_proxy().node], set()
        while pending:
            node = pending.pop()
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, Tensor) and not value.is_leaf:
                raise RuntimeError(_COMPILED)
            pending += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)

    comptime(look)


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield each node of the graphs of ``tensors`` once, with the edges to its inputs."""
    seen: set[Any] = set()
    pending = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = node.next_functions
        yield node, edges
        pending.extend([parent for parent, _ in edges])


def _is_foreign(kind: type) -> bool:
    """Return whether a node type belongs to a custom function that is not part of this library."""
    if kind.__name__ == "CompiledFunctionBackward":
        raise RuntimeError(_COMPILED)
    function = getattr(kind, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] != "gradl1_fast"


def require_gradients(names: Sequence[str], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients; raise if one is missing.

    Raises:
        RuntimeError: names the tensors without a gradient.
    """
    missing = [name for name, grad in zip(names, grads, strict=True) if grad is None]
    if missing:
        raise RuntimeError(f"GradL1: no gradient reached {', '.join(missing)}. {WHY_NOT_REACHED}")
    return [grad for grad in grads if grad is not None]
