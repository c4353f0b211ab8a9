"""Cross-layer equalization: scale moved from one layer to the next, so that channels share a range better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from gradl1_fast.conversion.graphs import module_of, operation_of
from gradl1_fast.nn.layers import QLinear, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.hooks import has_hooks
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["Equalization", "equalize"]

_ROUNDS, _CLOSE = 100, 1e-3

# Each of these gives s * y for s * x, channel by channel, for every s > 0.
_HOMOGENEOUS = (
    *(nn.ReLU, nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, ActivationQuantizer),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_HOMOGENEOUS_NAMES = ("relu", "flatten", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")


@dataclass
class Equalization:
    """What :func:`equalize` made.

    Attributes:
        model: the equalized model.
        pairs: names of the layers between which scale was moved.
        uncalibrated: quantizers between them, whose ranges no longer fit and were dropped.
        without_range: layers whose stored weight range was dropped.
    """

    model: nn.Module
    pairs: list[tuple[str, str]] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    without_range: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line for each pair, and what has to be calibrated again."""
        lines = [f"{first} and {second}: equalized" for first, second in self.pairs]
        lines += [f"{name}: calibrate again" for name in self.uncalibrated]
        lines += [f"{name}: its stored weight range was dropped" for name in self.without_range]
        return "\n".join(lines) or "no two layers to equalize"


@dataclass
class _Pair:
    names: tuple[str, str]
    layers: tuple[QuantizedLayer, QuantizedLayer]
    quantizers: list[ActivationQuantizer]


def equalize(model: nn.Module) -> Equalization:
    """Give each channel between two layers the same range in both, without changing the float function.

    Where a layer feeds another through nothing but ReLU, pooling, dropout, flattening and quantizers,
    channel i of the first is divided by ``s_i = sqrt(r1_i / r2_i)``, with r the largest weight of the
    channel on either side, and multiplied by it in the second; again and again until nothing moves. With one
    range for a tensor no channel is then much smaller than the others. Fold batch norms first: they
    stand between layers. Sums, ReLU6 and grouped (but not depthwise) convolutions end a chain.

    The model stays as it is; the result is a new one that shares what was not equalized. Ranges of the
    activations in between are dropped: calibrate it.

    Args:
        model: a converted model, usually :attr:`gradl1_fast.Folding.model`.

    Raises:
        ValueError: the model was not traced.

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.
    """
    if not isinstance(model, ConvertedModel):
        raise ValueError("equalize: needs a model that gradl1_fast.convert could trace")
    refuse_sliced(model, "equalize")
    result = Equalization(copy_model(model))
    pairs = list(_pairs(result.model))  # type: ignore[arg-type]
    _balance(pairs)
    names = {id(m): name for name, m in result.model.named_modules()}
    for pair in pairs:
        result.pairs.append(pair.names)
        for quantizer in pair.quantizers:
            quantizer.low = quantizer.high = None
            result.uncalibrated.append(names[id(quantizer)])
        for layer in pair.layers:
            if layer.weight_quantizer.clip is not None:
                layer.weight_quantizer.set_clip(None)
                result.without_range.append(names[id(layer)])
    return result


def _pairs(model: ConvertedModel) -> Iterator[_Pair]:
    calls = count_calls(model, model.graph)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for node in model.graph.nodes:
        first = module_of(model, node)
        if not isinstance(first, QuantizedLayer) or not _alone(first, calls, owners):
            continue
        quantizers: list[ActivationQuantizer] = []
        end = _follow(model, node, calls, quantizers)
        second = None if end is None else module_of(model, end)
        if end is not None and isinstance(second, QuantizedLayer) and _alone(second, calls, owners):
            if second.input_quantizer is not None:
                quantizers.append(second.input_quantizer)
            if _input_range(second, len(first.weight)) is not None:
                yield _Pair((str(node.target), str(end.target)), (first, second), quantizers)


def _alone(layer: QuantizedLayer, calls: Counter[int], owners: Counter[int]) -> bool:
    shared = any(owners[id(p)] > 1 for p in layer.parameters(recurse=False))
    return calls[id(layer)] == 1 and not shared and not has_hooks(layer)


def _follow(
    model: nn.Module, node: fx.Node, calls: Counter[int], quantizers: list[ActivationQuantizer]
) -> fx.Node | None:
    """Return the layer that ``node`` feeds and nothing else, collecting quantizers on the way."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = module_of(model, node)
        if isinstance(module, QuantizedLayer):
            return node
        if module is not None and (calls[id(module)] > 1 or has_hooks(module)):
            return None
        if not _is_homogeneous(node, module):
            return None
        quantizer = module.quantizer if isinstance(module, Act2d) else module
        if isinstance(quantizer, ActivationQuantizer):
            quantizers.append(quantizer)
    return None


def _is_homogeneous(node: fx.Node, module: nn.Module | None) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if isinstance(module, Act2d):
        return module.activation in ("none", "relu")
    operation = operation_of(node)
    return isinstance(module, _HOMOGENEOUS) or getattr(operation, "__name__", operation) in _HOMOGENEOUS_NAMES


def _input_range(layer: QuantizedLayer, channels: int) -> Tensor | None:
    """Return the largest weight that reads each of the channels, or None if they cannot be told apart."""
    weight = layer.weight.detach().double().abs()
    if isinstance(layer, QLinear):
        return weight.amax(0).reshape(channels, -1).amax(1) if weight.shape[1] % channels == 0 else None
    if weight.shape[1] == channels:
        return weight.transpose(0, 1).flatten(1).amax(1)
    depthwise = weight.shape[1] == 1 and layer.groups == channels
    return weight.flatten(1).amax(1).reshape(channels, -1).amax(1) if depthwise else None


@torch.no_grad()
def _balance(pairs: list[_Pair]) -> None:
    """Move scale until nothing moves, in float64; the layers get parameters of their own."""
    layers = {id(layer): layer for pair in pairs for layer in pair.layers}
    types = {key: layer.weight.dtype for key, layer in layers.items()}
    for layer in layers.values():
        _own_parameters(layer, torch.float64)
    for _ in range(_ROUNDS):
        moved = [_move(*pair.layers) for pair in pairs]
        if max(moved, default=0.0) < _CLOSE:
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
    usable = (outgoing > 0) & (incoming > 0)  # a dead channel has no scale to be moved
    s = torch.where(usable, (outgoing / incoming.clamp(min=1e-300)).sqrt(), 1.0)
    first.weight /= s.reshape(-1, *[1] * (first.weight.dim() - 1))
    if first.bias is not None:
        first.bias /= s
    if isinstance(second, QLinear):
        second.weight *= s.repeat_interleave(second.weight.shape[1] // len(s))
    elif second.weight.shape[1] == len(s):
        second.weight *= s.reshape(1, -1, *[1] * (second.weight.dim() - 2))
    else:
        per_output = s.repeat_interleave(second.weight.shape[0] // len(s))
        second.weight *= per_output.reshape(-1, *[1] * (second.weight.dim() - 1))
    return float((s - 1).abs().max())
