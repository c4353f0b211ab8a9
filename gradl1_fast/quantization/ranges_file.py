"""Files of ranges in the safetensors format. Every entry is checked before a model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast import _safetensors
from gradl1_fast._safetensors import TensorFile
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.rounded import MadeFor
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._sites import Stored, by_quantizer, every_site, same_range
from gradl1_fast.quantization.calibration import quantizers_of
from gradl1_fast.quantization.freshness import remember_ranges, warn_if_stale
from gradl1_fast.quantization.rounding.entries import checked_codes, codes_entries, take_codes
from gradl1_fast.quantization.rounding.kept import drop_rounding
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["load_ranges", "save_ranges"]

METADATA = {"format": "gradl1_fast.ranges", "version": "2"}
WITH_CODES = {**METADATA, "version": "3"}  # what knows version 2 alone cannot read codes
_KIND = "files of ranges"
_ENDS = ("low", "high")


def save_ranges(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the activation ranges of a model, and stored ranges and codes of its weights, to a file.

    The file is in the safetensors format. The site of each layer, shared or not, has the entries
    ``<name>.low`` and ``<name>.high``, each with one value or 16 for 1 to 16 bits, and ``<name>.is_input``, 1
    for the network's input; a site without a range has only the last. A weight with a stored range has
    ``<layer>.weight_quantizer.clip``, see :class:`gradl1_fast.nn.WeightQuantizer`. Codes from
    :func:`gradl1_fast.round_weights` are ``<layer>.weight_quantizer.codes.<w>`` for each width w, int8 or
    int16, with ``<layer>.weight_quantizer.made_for.<w>``, which identifies the weight that they belong to.
    The file is replaced atomically.

    Args:
        model: a converted, calibrated model.
        path: path of the file, usually ending in ``.safetensors``.

    Raises:
        ImportError: safetensors is not installed.
        RuntimeError: no activation has a range yet.
        ValueError: the model has no activation quantizers.
        OSError: the file cannot be written.
    """
    _safetensors.require(_KIND, "export")
    quantizers_of(model)
    entries = {}
    for name, quantizer in every_site(model).items():
        entries[f"{name}.is_input"] = torch.tensor(quantizer.is_input, dtype=torch.uint8)
        if quantizer.low is not None and quantizer.high is not None:
            entries |= {f"{name}.low": quantizer.low, f"{name}.high": quantizer.high}
    if not any(key.endswith(".low") for key in entries):
        raise RuntimeError("save_ranges: no activation has a range: call gradl1_fast.calibrate first")
    warn_if_stale(model)
    for name, weights in _weight_quantizers(model).items():
        if weights.clip is not None:
            entries[f"{name}.clip"] = weights.clip
    codes = codes_entries(model)
    entries |= codes
    _safetensors.save(path, entries, WITH_CODES if codes else METADATA, what=_KIND)


def load_ranges(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the ranges that :func:`save_ranges` wrote for a model of the same structure.

    A weight without an entry gets its own range and is rounded to nearest; a site without an entry has no
    range. The file is read as data; nothing in it is executed, and every entry is checked before the model is
    changed. Codes belong to one weight; using them with another raises, see
    :func:`gradl1_fast.round_weights`.

    Args:
        model: a converted model; calibrated or not.
        path: path of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a file of ranges; an entry is missing, unknown, of a wrong shape or type,
            not finite or inverted; layers that share a site have different entries; the model has no
            activation quantizers; or the file has ranges of weights and the model no float weights. The
            message names the file and the entry. The model is then unchanged.
    """
    quantizers_of(model)
    sites, weights = every_site(model), _weight_quantizers(model)
    entries = _read(path)
    rounded = take_codes(entries, model)
    _check_names(path, entries, sites, weights)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    entries = {key: value.to(device) for key, value in entries.items()}
    ranges = {name: _checked_range(path, name, entries) for name in sites}
    _check_shared(path, sites, ranges)
    if rounded or any(f"{name}.clip" in entries for name in weights):
        refuse_sliced(model, f"load_ranges: {path} has ranges of weights")
    codes = checked_codes(path, rounded, model)
    for name, layer in named_layers(model).items():
        key = f"{name}.weight_quantizer".removeprefix(".")
        if f"{key}.clip" in entries:
            _check_clip(path, key, layer, entries[f"{key}.clip"])
    for _, quantizer, (low, high, is_input) in by_quantizer(sites, ranges):
        quantizer.low, quantizer.high, quantizer.is_input = low, high, is_input
    for name, weight in weights.items():
        weight.set_clip(entries.get(f"{name}.clip"))
    for name, layer in named_layers(model).items():
        _set_codes(layer, codes[name], device)
    remember_ranges(model)


def _set_codes(layer: QuantizedLayer, codes: list[tuple[int, Tensor, MadeFor]], device: torch.device) -> None:
    drop_rounding(layer)
    for bits, values, made_for in codes:
        layer.weight_quantizer.set_rounded(bits, values.to(device), made_for)


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with TensorFile(path) as file:
        file.check_metadata({"format": METADATA["format"]})
        version, known = file.metadata("version"), (METADATA["version"], WITH_CODES["version"])
        if version not in known:
            raise ValueError(
                f"{path}: its version is {version!r:.80}, but this library reads "
                f"{' and '.join(map(repr, known))}"
            )
        return {key: file.read(key) for key in file}


def _check_names(
    path: str | os.PathLike[str],
    entries: Mapping[str, Tensor],
    sites: Mapping[str, ActivationQuantizer],
    weights: Mapping[str, WeightQuantizer],
) -> None:
    needed = {f"{name}.is_input" for name in sites}
    for name in sites:
        if any(f"{name}.{end}" in entries for end in _ENDS):
            needed |= {f"{name}.{end}" for end in _ENDS}
    allowed = needed | {f"{name}.clip" for name in weights}
    for problem, keys in (("missing", needed - entries.keys()), ("unknown", entries.keys() - allowed)):
        if keys:
            raise ValueError(f"{path}: {problem} entries for this model: {check.some(keys)}")
    for key, value in entries.items():
        if key.endswith(".is_input"):
            if value.dtype != torch.uint8 or value.dim() or int(value) > 1:
                raise ValueError(f"{path}: entry {key!r} must be a single uint8, 0 or 1")
        elif value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{path}: entry {key!r} must have type float32 or float64, got {value.dtype}")
        elif value.dim() > (
            2 if key.endswith(".clip") else 1
        ):  # not the shape, which may have thousands of entries
            raise ValueError(f"{path}: entry {key!r} has too many dimensions: {value.dim()}")


def _checked_range(path: str | os.PathLike[str], name: str, entries: Mapping[str, Tensor]) -> Stored:
    scratch = ActivationQuantizer(is_input=bool(entries[f"{name}.is_input"]))
    if f"{name}.low" in entries:
        _checked(path, name, scratch.set_range, entries[f"{name}.low"], entries[f"{name}.high"])
    return scratch.low, scratch.high, scratch.is_input


def _check_shared(
    path: str | os.PathLike[str], sites: Mapping[str, ActivationQuantizer], ranges: Mapping[str, Stored]
) -> None:
    first = {id(quantizer): name for name, quantizer, _ in by_quantizer(sites, ranges)}
    for name, quantizer in sites.items():
        other = first[id(quantizer)]
        if not same_range(ranges[name], ranges[other]):
            raise ValueError(
                f"{path}: entry {name!r}: {name} and {other} share one tensor in this model, but differ"
            )


def _check_clip(path: str | os.PathLike[str], name: str, layer: QuantizedLayer, clip: Tensor) -> None:
    scratch = WeightQuantizer(per_channel=layer.weight_quantizer.axis is not None)
    _checked(path, f"{name}.clip", scratch.set_clip, clip)
    channels = used_weight(layer).shape[layer.out_axis]
    if clip.shape[1] not in (1, channels):
        raise ValueError(f"{path}: entry {name}.clip is for {clip.shape[1]} channels, not {channels}")


def _checked(path: str | os.PathLike[str], name: str, check: Any, *values: Tensor) -> None:
    try:
        check(*values)
    except ValueError as error:
        raise ValueError(f"{path}: entry {name!r}: {error}") from error


def _weight_quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, WeightQuantizer)}
