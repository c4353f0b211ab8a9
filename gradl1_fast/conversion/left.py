"""Finds the weights that conversion leaves in float."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm, normalization

from gradl1_fast.nn.layers import QuantizedLayer

__all__ = ["NORMALISATIONS", "left_in_float", "size_of"]

NORMALISATIONS = (
    *(batchnorm._NormBase, instancenorm._InstanceNorm),
    *(normalization.GroupNorm, normalization.LayerNorm, normalization.RMSNorm),
)


def left_in_float(model: nn.Module) -> dict[str, int]:
    """Return the number of weights outside of this library's layers, by name and class of their module.

    A weight is a parameter of two or more dimensions. Normalisations are not counted.
    """
    quantized = {id(p) for m in model.modules() if isinstance(m, QuantizedLayer) for p in m.parameters()}
    seen = set(quantized)
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, *NORMALISATIONS)):
            continue
        weights = [p for p in module._parameters.values() if _is_weight(p) and id(p) not in seen]
        seen.update(map(id, weights))
        if weights:
            sizes[f"{name or 'the model'} ({type(module).__name__})"] = sum(p.numel() for p in weights)
    return sizes


def size_of(model: nn.Module) -> int:
    """Return the number of weights of a model."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def _is_weight(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > 1
