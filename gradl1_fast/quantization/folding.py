"""Batch-norm folding: the normalisation of evaluation mode becomes part of the convolution before it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast.conversion.graphs import module_of, operation_of
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QuantizedLayer
from gradl1_fast.nn.hooks import has_hooks
from gradl1_fast.quantization._modes import evaluation
from gradl1_fast.quantization.sliced import SlicedWeight

__all__ = ["Folding", "fold_batch_norm"]

_CONVOLUTIONS = (QConv1d, QConv2d, QConv3d)


@dataclass
class Folding:
    """What :func:`fold_batch_norm` made.

    Attributes:
        model: the folded model.
        folded: the convolution that took a batch norm in, by the batch norm's name.
        refused: why a batch norm stays, by its name.
        without_range: layers whose stored weight range no longer fits, and was dropped.
        difference: largest difference between the outputs before and after, and ``scale`` the largest
            output before; None if no inputs were given.
        scale: see ``difference``.
    """

    model: nn.Module
    folded: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    without_range: list[str] = field(default_factory=list)
    difference: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        """Return one line for each batch norm, and one for the difference."""
        lines = [f"{bn}: folded into {conv}" for bn, conv in self.folded.items()]
        lines += [f"{bn}: not folded: {reason}" for bn, reason in self.refused.items()]
        lines += [f"{name}: its stored weight range was dropped" for name in self.without_range]
        if self.difference is not None:
            lines.append(
                f"largest output difference: {self.difference:.3g} (largest output {self.scale:.3g})"
            )
        return "\n".join(lines) or "no batch norm"


def fold_batch_norm(model: nn.Module, inputs: Tensor | None = None) -> Folding:
    """Fold each batch norm into the convolution before it, for evaluation and export.

    With ``f = gamma / sqrt(var + eps)``, the convolution's weight becomes ``f * W`` and its bias
    ``beta + f * (b - mean)``, computed in float64. The model stays as it is; the result is a new one:

    - a folded convolution stands under its name, with a weight and a bias of its own;
    - a folded ``BatchNormAct2d`` is replaced, under its name, by a :class:`gradl1_fast.nn.Act2d`, which
      adds the residual, activates and quantizes with the same quantizer, so that ranges fit as before;
      another batch norm by an ``nn.Identity``;
    - everything else shares its parameters with the model.

    A batch norm that cannot be folded stays, and a warning and :attr:`Folding.refused` say why. That is
    one in training mode or without running statistics, one whose input is not the output of a
    convolution (as in conv -> ReLU -> BN) or is read elsewhere too, one called or with a convolution
    called in several places, with a weight that another layer shares, or with hooks.

    The weights that are quantized are then those of the folded convolutions: with one range for a
    tensor, channels of very different ``f`` share it. A stored range is scaled where each channel has
    one, and dropped otherwise.

    Args:
        model: a converted model, in evaluation mode.
        inputs: a batch on which the outputs of both models, in float, are compared.

    Raises:
        ValueError: the model has no layers of this library.
        TypeError: the output to be compared is not a tensor.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> plain = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU())
        >>> folding = gl.fold_batch_norm(gl.convert(plain).eval(), torch.randn(4, 1, 6, 6))
        >>> folding.model.get_submodule("0").bias is not None
        True
    """
    if not any(isinstance(m, QuantizedLayer | BatchNormAct2d) for m in model.modules()):
        raise ValueError("fold_batch_norm: the model is not converted: call gradl1_fast.convert(model) first")
    result = Folding(copy_model(model))
    names = {id(m): name for name, m in result.model.named_modules()}
    pairs, result.refused = _pairs(result.model, names)
    for norm, conv in pairs:
        result.folded[names[id(norm)]] = names[id(conv)]
        if not _fold(norm, conv):
            result.without_range.append(names[id(conv)])
        replace_module(result.model, norm, _remainder(norm))
    if result.refused:
        reasons = "; ".join(f"{name} {reason}" for name, reason in result.refused.items())
        warnings.warn(f"fold_batch_norm: not folded: {reasons}", stacklevel=2)
    if inputs is not None:
        result.difference, result.scale = _compare(model, result.model, inputs)
    return result


def _pairs(
    model: nn.Module, names: dict[int, str]
) -> tuple[list[tuple[_BatchNorm, QuantizedLayer]], dict[str, str]]:
    """Return what can be folded, and why other batch norms cannot."""
    calls = Counter[int]()
    for graph_model in _graph_models(model):
        calls += count_calls(graph_model, graph_model.graph)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    pairs: dict[int, tuple[_BatchNorm, QuantizedLayer]] = {}
    refused: dict[str, str] = {}
    for node, graph_model in [(n, m) for m in _graph_models(model) for n in m.graph.nodes]:
        norm = module_of(graph_model, node)
        if not isinstance(norm, _BatchNorm):
            continue
        source = node.all_input_nodes[0]
        conv = module_of(graph_model, source)
        reason = _own_reason(norm, calls) or _source_reason(source, conv, calls, owners, names)
        if reason is None and isinstance(conv, QuantizedLayer):
            pairs[id(norm)] = norm, conv
        else:
            refused[names[id(norm)]] = str(reason)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and not calls[id(norm)]:
            refused[names[id(norm)]] = "is not called in a traced graph, so that its input is unknown"
    return list(pairs.values()), refused


def _graph_models(model: nn.Module) -> Iterator[ConvertedModel]:
    return (m for m in model.modules() if isinstance(m, ConvertedModel))


def _own_reason(norm: _BatchNorm, calls: Counter[int]) -> str | None:
    if norm.training:
        return "is in training mode: call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if calls[id(norm)] > 1:
        return "is called in several places"
    return "has hooks" if has_hooks(norm) else None


def _source_reason(
    source: fx.Node, conv: nn.Module | None, calls: Counter[int], owners: Counter[int], names: dict[int, str]
) -> str | None:
    if not isinstance(conv, _CONVOLUTIONS):
        what = source.name if conv is None else f"{names[id(conv)]} ({type(conv).__name__})"
        operation = operation_of(source)
        kind = getattr(operation, "__name__", operation)
        return f"follows {what if operation is None else kind}, not a convolution"
    name = names[id(conv)]
    if isinstance(conv.weight_quantizer, SlicedWeight):
        return f"follows {name}, which holds bits of an any-bit file and no float weight"
    if calls[id(conv)] > 1:
        return f"follows {name}, which is called in several places"
    if len(source.users) > 1:
        return f"follows {name}, whose output is read elsewhere too"
    if any(owners[id(p)] > 1 for p in conv.parameters(recurse=False)):
        return f"follows {name}, which shares a parameter with another layer"
    return f"follows {name}, which has hooks" if has_hooks(conv) else None


@torch.no_grad()
def _fold(norm: _BatchNorm, conv: QuantizedLayer) -> bool:
    """Fold; return False if a stored weight range had to be dropped."""
    if norm.running_mean is None or norm.running_var is None:
        raise RuntimeError("a batch norm without statistics cannot be folded")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -mean if conv.bias is None else conv.bias.double() - mean
    bias = bias * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * factor.reshape(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight = _parameter(weight, conv.weight)
    conv.bias = _parameter(bias, conv.weight)
    return _scale_range(conv, factor)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.to(like.dtype)
    if like.dim() == value.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _scale_range(conv: QuantizedLayer, factor: Tensor) -> bool:
    clip = conv.weight_quantizer.clip
    if clip is None:
        return True
    fits = conv.weight_quantizer.axis == 0
    conv.weight_quantizer.set_clip((clip * factor.abs()).to(clip.dtype) if fits else None)
    return fits


def _remainder(norm: _BatchNorm) -> nn.Module:
    if isinstance(norm, BatchNormAct2d):
        return Act2d.after_folding(norm)
    return nn.Identity().train(norm.training)


def _compare(before: nn.Module, after: nn.Module, inputs: Tensor) -> tuple[float, float]:
    outputs = []
    for model in (before, after):
        with evaluation(model):
            outputs.append(model(inputs))
    if not all(isinstance(y, Tensor) for y in outputs):
        raise TypeError(f"fold_batch_norm: outputs to be compared must be tensors, got {type(outputs[0])}")
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].abs().max())
