"""Codes of weights as entries of a file of ranges.

``<layer>.weight_quantizer.codes.<w>`` contains the codes of a width in the shape of the weight, int8 up to 8
bits and int16 above. ``<layer>.weight_quantizer.made_for.<w>`` contains a digest of the weight that the codes
were chosen for, four int64, followed by a digest of its stored range, if any.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradl1_fast._checks import MAX_BITS
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.rounded import MadeFor
from gradl1_fast.nn.sites import named_layers

__all__ = ["Rounded", "checked_codes", "codes_entries", "take_codes"]

Rounded = dict[str, dict[int, tuple[Tensor, Tensor]]]  # codes and digests, by layer and width
_DIGESTS = 4  # int64 per digest


def codes_entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries for the codes of a model."""
    entries: dict[str, Tensor] = {}
    for name, layer in named_layers(model).items():
        for bits, codes in layer.weight_quantizer.rounded.items():
            made_for = layer.weight_quantizer.made_for(bits)
            assert made_for is not None
            entries[_key(name, "codes", bits)] = codes
            entries[_key(name, "made_for", bits)] = torch.tensor([*made_for.weight, *made_for.clip])
    return entries


def take_codes(entries: dict[str, Tensor], model: nn.Module) -> Rounded:
    """Remove and return the entries of a file that may be codes of a model's layers."""
    taken: Rounded = {}
    for name in named_layers(model):
        for bits in range(1, MAX_BITS + 1):
            keys = _key(name, "codes", bits), _key(name, "made_for", bits)
            if all(key in entries for key in keys):
                taken.setdefault(name, {})[bits] = entries.pop(keys[0]), entries.pop(keys[1])
    return taken


def checked_codes(
    path: str | os.PathLike[str], rounded: Rounded, model: nn.Module
) -> Mapping[str, list[tuple[int, Tensor, MadeFor]]]:
    """Return the widths, codes and digests of each layer.

    Raises:
        ValueError: an entry has a wrong shape or type, or a code outside of its grid.
    """
    layers = named_layers(model)
    result: dict[str, list[tuple[int, Tensor, MadeFor]]] = {name: [] for name in layers}
    for name, widths in rounded.items():
        for bits, (codes, numbers) in widths.items():
            error = _error_in_codes(layers[name], bits, codes)
            if error:
                raise ValueError(f"{path}: entry {_key(name, 'codes', bits)!r} {error}")
            if numbers.dtype != torch.int64 or numbers.shape not in ((_DIGESTS,), (2 * _DIGESTS,)):
                key, counts = _key(name, "made_for", bits), f"{_DIGESTS} or {2 * _DIGESTS}"
                raise ValueError(f"{path}: entry {key!r} must be {counts} int64")
            values = tuple(numbers.tolist())
            made_for = MadeFor(values[:_DIGESTS], values[_DIGESTS:], name)
            result[name].append((bits, codes, made_for))
    return result


def _error_in_codes(layer: QuantizedLayer, bits: int, codes: Tensor) -> str:
    weight = used_weight(layer)
    kind = torch.int8 if bits <= 8 else torch.int16
    if codes.dtype != kind:
        return f"must have type {kind}, got {codes.dtype}"
    if codes.shape != weight.shape:
        has = f"{codes.dim()} dimensions and {codes.numel()} values"
        return f"is for a weight of {has}, not {list(weight.shape)}"
    _, _, q_min, q_max = layer.weight_quantizer.grid(weight, bits)
    if codes.numel() and not bool(((codes >= q_min) & (codes <= q_max)).all()):
        return f"has a code outside {q_min} to {q_max}"
    return ""


def _key(name: str, kind: str, bits: int) -> str:
    return f"{name}.weight_quantizer.{kind}.{bits}".removeprefix(".")
