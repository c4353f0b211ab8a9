"""Cross-layer equalization: moves scale between layers, so that channels have similar ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from gradl1_fast._shown import Shown
from gradl1_fast.conversion.graphs import module_of, operation_of
from gradl1_fast.conversion.tracing import parts_of
from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QLinear, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.folded import divide_norm
from gradl1_fast.quantization.freshness import is_fresh, remember_weights
from gradl1_fast.quantization.kept import drop_values
from gradl1_fast.quantization.rounding.kept import drop_rounding
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["Equalization", "equalize"]

_ROUNDS, _CLOSE = 100, 1e-3
_LAYERS = (QConv1d, QConv2d, QConv3d, QLinear)

# Operations that are homogeneous in each channel: f(s * x) = s * f(x) for every s > 0.
_HOMOGENEOUS = (
    *(nn.ReLU, nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, ActivationQuantizer),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_HOMOGENEOUS_NAMES = (
    "relu",
    "relu_",
    "flatten",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "dropout",
)


@dataclass(repr=False)
class Equalization(Shown):
    """The result of :func:`equalize`.

    Attributes:
        model: the equalized model.
        pairs: names of the layers between which scale was moved.
        uncalibrated: sites between them, whose ranges were dropped because they no longer fit.
        without_range: layers whose stored weight range was dropped.
        without_rounding: layers whose codes of :func:`gradl1_fast.round_weights` were dropped.
    """

    model: nn.Module
    pairs: list[tuple[str, str]] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    without_range: list[str] = field(default_factory=list)
    without_rounding: list[str] = field(default_factory=list)

    def _parts(self) -> list[str]:
        lines = [f"{first} and {second}: equalized" for first, second in self.pairs]
        lines += [f"{name}: calibrate again" for name in self.uncalibrated]
        lines += [f"{name}: its stored weight range was dropped" for name in self.without_range]
        lines += [f"{name}: rounded to nearest again" for name in self.without_rounding]
        return lines or ["no two layers to equalize"]


@dataclass
class _Pair:
    names: tuple[str, str]
    layers: tuple[QuantizedLayer, QuantizedLayer]
    quantizers: list[ActivationQuantizer]


def equalize(model: nn.Module) -> Equalization:
    """Give each channel between two layers the same range in both, without changing the float function.

    Where a layer feeds another through nothing but ReLU, pooling, dropout and flattening,
    channel i of the first is divided by ``s_i = sqrt(r1_i / r2_i)``, with r the largest weight of the
    channel on either side, and multiplied by it in the second, repeatedly until convergence. With one range
    per tensor, no channel is then much smaller than the others. Fold batch norms first, because they
    separate layers. Sums, ReLU6, transposed and grouped (but not depthwise) convolutions end a chain.
    Chains are found in what can be traced of the model: all of it, or parts.

    The model is unchanged; the result is a new model that shares everything that was not equalized. The
    activation ranges in between and re-estimated statistics are dropped: calibrate the result.

    Args:
        model: a converted model, usually :attr:`gradl1_fast.Folding.model`.

    Raises:
        ValueError: the model is not converted, or no part of it can be traced.

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.
    """
    refuse_sliced(model, "equalize")
    result = Equalization(copy_converted(model))
    drop_values(result.model)
    pairs = _pairs(result.model)
    layers = {id(layer): layer for pair in pairs for layer in pair.layers}
    fresh = [layer for layer in layers.values() if is_fresh(layer)]
    _balance(pairs)
    remember_weights(fresh)
    names = {id(q): name for name, q in named_quantizers(result.model).items()}
    names |= {id(layer): name for name, layer in named_layers(result.model).items()}
    for pair in pairs:
        result.pairs.append(pair.names)
        for quantizer in pair.quantizers:
            quantizer.low = quantizer.high = None
            result.uncalibrated.append(names[id(quantizer)])
        for layer in pair.layers:
            if layer.weight_quantizer.clip is not None:
                layer.weight_quantizer.set_clip(None)
                result.without_range.append(names[id(layer)])
            if drop_rounding(layer):
                result.without_rounding.append(names[id(layer)])
    return result


def _pairs(model: nn.Module) -> list[_Pair]:
    graphs = [(p.name, p.container, p.traced.graph) for p in parts_of(model) if p.traced is not None]
    if not graphs:
        raise ValueError("equalize: the model must be converted, and at least a part of it traceable")
    chains = _Chains(model, graphs)
    return [pair for name, root, graph in graphs for pair in chains.pairs(name, root, graph)]


class _Chains:
    """Finds layers that feed another layer, and the operations between them, in the graphs of a model."""

    def __init__(self, model: nn.Module, graphs: list[tuple[str, nn.Module, fx.Graph]]) -> None:
        modules = [module_of(root, node) for _, root, graph in graphs for node in graph.nodes]
        self._calls = Counter(map(id, modules))
        self._owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self._sites = Counter(id(layer.input_quantizer) for layer in named_layers(model).values())
        self._read = {id(v) for _, root, graph in graphs for v in _attributes(root, graph)}

    def pairs(self, part: str, root: nn.Module, graph: fx.Graph) -> Iterator[_Pair]:
        for node in graph.nodes:
            first = module_of(root, node)
            if not isinstance(first, _LAYERS) or not self._alone(first):
                continue
            quantizers: list[ActivationQuantizer] = []
            end = self._follow(root, node, quantizers)
            second = None if end is None else module_of(root, end)
            if end is None or not isinstance(second, _LAYERS) or not self._alone(second):
                continue
            if second.input_quantizer is None or self._sites[id(second.input_quantizer)] > 1:
                continue  # another layer reads the same tensor
            if _input_range(second, len(first.weight)) is not None:
                names = tuple(f"{part}.{n.target}".removeprefix(".") for n in (node, end))
                yield _Pair(names, (first, second), [*quantizers, second.input_quantizer])  # type: ignore[arg-type]

    def _alone(self, layer: QuantizedLayer) -> bool:
        parameters = list(layer.parameters(recurse=False))
        shared = any(self._owners[id(p)] > 1 or id(p) in self._read for p in parameters)
        own_code = has_hooks(layer) or has_own_forward(layer) or layer.is_computed
        return self._calls[id(layer)] == 1 and not shared and not own_code

    def _follow(
        self, root: nn.Module, node: fx.Node, quantizers: list[ActivationQuantizer]
    ) -> fx.Node | None:
        """Return the layer that is the only reader of ``node``, and collect the quantizers in between."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            module = module_of(root, node)
            if isinstance(module, QuantizedLayer):
                return node
            if module is not None and (self._calls[id(module)] > 1 or has_hooks(module)):
                return None
            if not _is_homogeneous(node, module):
                return None
            if isinstance(module, ActivationQuantizer):
                quantizers.append(module)
        return None


def _attributes(root: nn.Module, graph: fx.Graph) -> Iterator[object]:
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            owner, _, name = str(node.target).rpartition(".")
            yield getattr(root.get_submodule(owner), name, None)


def _is_homogeneous(node: fx.Node, module: nn.Module | None) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    operation = operation_of(node)
    return isinstance(module, _HOMOGENEOUS) or getattr(operation, "__name__", operation) in _HOMOGENEOUS_NAMES


def _input_range(layer: QuantizedLayer, channels: int) -> Tensor | None:
    """Return the largest weight that reads each channel, or None if channels cannot be distinguished."""
    weight = layer.weight.detach().double().abs()
    if isinstance(layer, QLinear):
        return weight.amax(0).reshape(channels, -1).amax(1) if weight.shape[1] % channels == 0 else None
    if weight.shape[1] == channels:
        return weight.transpose(0, 1).flatten(1).amax(1)
    depthwise = weight.shape[1] == 1 and layer.groups == channels
    return weight.flatten(1).amax(1).reshape(channels, -1).amax(1) if depthwise else None


@torch.no_grad()
def _balance(pairs: list[_Pair]) -> None:
    """Move scale in float64 until convergence; the layers get new parameters."""
    layers = {id(layer): layer for pair in pairs for layer in pair.layers}
    types = {key: layer.weight.dtype for key, layer in layers.items()}
    for layer in layers.values():
        _own_parameters(layer, torch.float64)
    for _ in range(_ROUNDS):
        change = [_move(*pair.layers) for pair in pairs]
        if max(change, default=0.0) < _CLOSE:
            break
    for key, layer in layers.items():
        _own_parameters(layer, types[key])


def _own_parameters(layer: QuantizedLayer, dtype: torch.dtype) -> None:
    for name, value in layer.named_parameters(recurse=False):
        new = value.detach().to(dtype, copy=True)
        setattr(layer, name, nn.Parameter(new, requires_grad=value.requires_grad))


def _move(first: QuantizedLayer, second: QuantizedLayer) -> float:
    """Move scale between two layers; return the largest change, as a share of a channel's range."""
    outgoing = first.weight.abs().flatten(1).amax(1)
    incoming = _input_range(second, len(outgoing))
    assert incoming is not None
    usable = (outgoing > 0) & (incoming > 0)  # a dead channel has no scale
    s = torch.where(usable, (outgoing / incoming.clamp(min=1e-300)).sqrt(), 1.0)
    first.weight /= s.reshape(-1, *[1] * (first.weight.dim() - 1))
    if first.bias is not None:
        first.bias /= s
    divide_norm(first, s)
    if isinstance(second, QLinear):
        second.weight *= s.repeat_interleave(second.weight.shape[1] // len(s))
    elif second.weight.shape[1] == len(s):
        second.weight *= s.reshape(1, -1, *[1] * (second.weight.dim() - 2))
    else:
        per_output = s.repeat_interleave(second.weight.shape[0] // len(s))
        second.weight *= per_output.reshape(-1, *[1] * (second.weight.dim() - 1))
    return float((s - 1).abs().max())
