"""Finds the layer that feeds only one batch norm, from traced graphs or from an observed forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from gradl1_fast.conversion.graphs import module_of, operation_of
from gradl1_fast.conversion.tracing import parts_of
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.quantization.absorption import is_batch_norm, is_frozen
from gradl1_fast.quantization.sliced import SlicedWeight
from gradl1_fast.quantization.watching import Watch

__all__ = ["NEEDS_INPUTS", "Neighbours"]

NEEDS_INPUTS = "give inputs"  # in the reason why a batch norm was not folded

_CONVOLUTION = (nn.modules.conv._ConvNd, nn.Linear)


class Neighbours:
    """Finds the batch norms of a model that can be folded.

    Args:
        model: a converted model.
        watch: an observed forward pass of the model; None without inputs.

    Attributes:
        pairs: the batch norms that can be folded, each with its layer.
        refused: the reason for every other batch norm, by name.
    """

    def __init__(self, model: nn.Module, watch: Watch | None) -> None:
        self._watch = watch
        self._names = {id(m): name for name, m in model.named_modules()}
        self._owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self._calls = Counter[int]()
        self._read: set[int] = set()  # parameters that graphs read by function
        graphs = [(p.container, p.traced.graph) for p in parts_of(model) if p.traced is not None]
        for root, graph in graphs:
            self._count(root, graph)
        self.pairs: list[tuple[Any, QuantizedLayer]] = []
        self.refused: dict[str, str] = {}
        self._seen: set[int] = set()
        for norm, reason, layer in self._from_graphs(graphs):
            self._decide(norm, reason, layer)
        for norm in model.modules():
            if is_batch_norm(norm) and id(norm) not in self._seen:
                self._decide(norm, *self._watched(norm))

    def _count(self, root: nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            module = module_of(root, node)
            if module is not None:
                self._calls[id(module)] += 1
            if node.op == "get_attr" and node.users:
                self._read.add(id(_attribute(root, str(node.target))))

    def _decide(self, norm: nn.Module, reason: str | None, layer: QuantizedLayer | None) -> None:
        name = self._names[id(norm)]
        if id(norm) in self._seen:
            self.pairs = [pair for pair in self.pairs if pair[0] is not norm]
            reason = "is called in several places"
        self._seen.add(id(norm))
        reason = _own_reason(norm) or reason
        if reason is None and layer is not None:
            reason = self._reason_of_layer(layer)
        if reason is None and layer is not None:
            self.pairs.append((norm, layer))
        else:
            self.refused[name] = str(reason)

    def _reason_of_layer(self, layer: Any) -> str | None:
        follows = f"follows {self._names[id(layer)]}, which"
        if isinstance(layer.weight_quantizer, SlicedWeight):
            return f"{follows} was loaded from an any-bit file and has no float weight"
        if layer.is_computed:
            return f"{follows} computes its weight in each forward pass"
        if any(self._owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
            return f"{follows} shares a parameter with another layer"
        if has_hooks(layer) or has_own_forward(layer):
            return f"{follows} has hooks"
        read = any(id(p) in self._read for p in layer.parameters(recurse=False))
        watch = self._watch
        if read or (watch is not None and id(layer) in watch.weight_read_elsewhere):
            return f"{follows} has a weight that is also used by function"
        if watch is not None and id(layer) in watch.read_elsewhere:
            return f"follows {self._names[id(layer)]}, whose output is read elsewhere too"
        if isinstance(layer, nn.Linear) and (watch is None or watch.dimensions.get(id(layer)) != 2):
            return f"{follows} is linear: give inputs, to see if its channels match those of the batch norm"
        return None

    def _from_graphs(
        self, graphs: list[tuple[nn.Module, fx.Graph]]
    ) -> Iterator[tuple[nn.Module, str | None, QuantizedLayer | None]]:
        for root, graph in graphs:
            for norm, source, alone in _calls_of_norms(root, graph):
                if self._calls[id(norm)] > 1:
                    yield norm, "is called in several places", None
                    continue
                layer = module_of(root, source)
                yield norm, self._reason_of_source(source, layer, alone), layer  # type: ignore[misc]

    def _reason_of_source(self, source: fx.Node, layer: nn.Module | None, alone: bool) -> str | None:
        if not isinstance(layer, QuantizedLayer) or not isinstance(layer, _CONVOLUTION):
            source_kind = (
                source.name if layer is None else f"{self._names[id(layer)]} ({type(layer).__name__})"
            )
            operation = operation_of(source)
            kind = getattr(operation, "__name__", operation)
            return f"follows {source_kind if operation is None else kind}, not a convolution"
        if self._calls[id(layer)] > 1:
            return f"follows {self._names[id(layer)]}, which is called in several places"
        return None if alone else f"follows {self._names[id(layer)]}, whose output is read elsewhere too"

    def _watched(self, norm: nn.Module) -> tuple[str | None, QuantizedLayer | None]:
        """Return why a batch norm cannot be folded according to the observed pass, or its layer."""
        if self._watch is None:
            return (
                f"is in a part that cannot be traced: {NEEDS_INPUTS}, to see in a pass what it follows",
                None,
            )
        fed = self._watch.fed.get(id(norm), [])
        if len(fed) != 1:
            return ("is called in several places" if fed else "was not called with these inputs"), None
        layer = fed[0]
        if layer is None or not isinstance(layer, _CONVOLUTION):
            return "does not follow a convolution directly", None
        if self._watch.calls[id(layer)] > 1:
            return f"follows {self._names[id(layer)]}, which is called in several places", None
        return None, layer


def _own_reason(norm: Any) -> str | None:
    if norm.training and not is_frozen(norm):
        return "is in training mode: call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    return "has hooks" if has_hooks(norm) or has_own_forward(norm) else None


def _calls_of_norms(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, fx.Node, bool]]:
    """Yield each call of a batch norm, its source, and whether the source feeds nothing else."""
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        module = module_of(root, node)
        if module is not None and is_batch_norm(module):
            yield module, node.all_input_nodes[0], len(node.all_input_nodes[0].users) == 1
        for scope in node.meta.get("nn_module_stack", ()):
            inside.setdefault(scope, []).append(node)
    for scope, nodes in inside.items():
        norm = root.get_submodule(scope.split("@")[0])
        if is_frozen(norm):
            taken = {
                n for node in nodes for n in node.all_input_nodes if n not in nodes and n.op != "get_attr"
            }
            if len(taken) == 1:
                source = taken.pop()
                yield norm, source, all(user in nodes for user in source.users)


def _attribute(root: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name, None)
