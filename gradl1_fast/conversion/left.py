"""Weights that conversion leaves in float."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm, normalization

from gradl1_fast.nn.layers import QuantizedLayer

__all__ = ["left_in_float", "size_of"]

_NORMALISATIONS = (
    *(batchnorm._NormBase, instancenorm._InstanceNorm),
    *(normalization.GroupNorm, normalization.LayerNorm, normalization.RMSNorm),
)


def left_in_float(model: nn.Module) -> dict[str, int]:
    """Return how many weights each module holds that are in no layer of this library, by name and class.

    A weight is a parameter of two dimensions or more; those of normalisations do not count.
    """
    quantized = {id(p) for m in model.modules() if isinstance(m, QuantizedLayer) for p in m.parameters()}
    seen = set(quantized)
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, *_NORMALISATIONS)):
            continue
        weights = [p for p in module._parameters.values() if _is_weight(p) and id(p) not in seen]
        seen.update(map(id, weights))
        if weights:
            left[f"{name or 'the model'} ({type(module).__name__})"] = sum(p.numel() for p in weights)
    return left


def size_of(model: nn.Module) -> int:
    """Return how many weights a model holds."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def _is_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > 1
