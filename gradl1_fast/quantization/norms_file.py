"""Files of re-estimated batch-norm statistics of all widths."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast import _json, _safetensors
from gradl1_fast._safetensors import Entry, TensorFile
from gradl1_fast.quantization.folded import folded_norm
from gradl1_fast.quantization.kept import (
    Values,
    is_width,
    keep_values,
    kept_values,
    mark_weights,
    put_back_float,
    use_after_loading,
    use_values,
)

__all__ = ["load_batch_norms", "save_batch_norms"]

METADATA = {"format": "gradl1_fast.batch_norms", "version": "1"}
_KIND = "files of batch norms"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def save_batch_norms(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the statistics of :func:`gradl1_fast.reestimate_batch_norm`, of all widths, to a file.

    The file is in the safetensors format. Its metadata contain ``widths``, a JSON list. For the i-th width,
    each batch norm has the entries ``<i>.running_mean.<name>`` and ``<i>.running_var.<name>``, and each layer
    with a folded batch norm ``<i>.factor.<name>`` and ``<i>.shift.<name>``, with one value per channel. The
    file is replaced atomically.

    Args:
        model: a converted model.
        path: path of the file, usually ending in ``.safetensors``.

    Raises:
        ImportError: safetensors is not installed.
        RuntimeError: no statistics were re-estimated.
        OSError: the file cannot be written.
    """
    _safetensors.require(_KIND, "export")
    widths: dict[str, int] = {}
    entries: dict[str, Tensor] = {}
    for name, module in _plain(model).named_modules():
        for width, values in kept_values(module).items():
            number = widths.setdefault(width, len(widths))
            for kind, value in values.items():
                entries[f"{number}.{kind}.{name}"] = value
    if not widths:
        raise RuntimeError(
            "save_batch_norms: the model has no statistics for any width: call "
            "gradl1_fast.reestimate_batch_norm(model, batches) first"
        )
    metadata = {**METADATA, "widths": _json.dumps(list(widths))}
    _safetensors.save(path, entries, metadata, what=_KIND)


def load_batch_norms(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the statistics that :func:`save_batch_norms` wrote for a model of the same structure.

    They belong to the current weights of the model. If the weights change, the statistics are dropped with a
    warning the next time a width is set.

    Args:
        model: a converted model.
        path: path of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or does not fit the model; the message names the file and the entry.
            The model is then unchanged.
    """
    model = _plain(model)
    modules = {name: m for name, m in model.named_modules() if _kinds_of(m)}
    with TensorFile(path) as file:
        file.check_metadata(METADATA)
        widths = _read_widths(file)
        statistics = {
            (name, width): values
            for number, width in enumerate(widths)
            for name, module in modules.items()
            if (values := _read_values(file, number, name, module))
        }
        file.check_that_all_are_known()
    put_back_float(model)  # marks refer to the weights in float
    for (name, width), values in statistics.items():
        keep_values(modules[name], width, values)
    mark_weights(model)
    use_after_loading(model)
    use_values(model)


def _plain(model: nn.Module) -> nn.Module:
    """Return the original model of a result of ``torch.compile``, whose names have a prefix."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _kinds_of(module: Any) -> tuple[str, ...]:
    if folded_norm(module) is not None:
        return ("shift",) if module.weight_quantizer.axis is None else ("factor", "shift")
    tracks = isinstance(module, _BatchNorm) and module.running_mean is not None
    return ("running_mean", "running_var") if tracks else ()


def _read_widths(file: TensorFile) -> list[str]:
    try:
        widths = json.loads(file.metadata("widths"))
    except RecursionError:
        widths = None
    if not isinstance(widths, list) or not widths or not all(map(is_width, widths)):
        raise file.error("widths", "must be a list of widths", f"{widths!r:.80}")
    if len(set(widths)) < len(widths):
        raise file.error("widths", "must not repeat a width", f"{widths!r:.80}")
    return widths


def _read_values(file: TensorFile, number: int, name: str, module: Any) -> Values:
    kinds = _kinds_of(module)
    keys = {kind: f"{number}.{kind}.{name}" for kind in kinds}
    if not any(key in file for key in keys.values()):  # no value reached it at that width
        return {}
    channels = _channels(module)
    values = {kind: file.read(key, *(Entry(d, (channels,)) for d in _FLOATS)) for kind, key in keys.items()}
    if "running_var" in values and bool((values["running_var"] < 0).any()):
        raise file.error(
            keys["running_var"], "a variance must not be negative", values["running_var"].min().item()
        )
    return values


def _channels(module: Any) -> int:
    norm = folded_norm(module)
    return len(module.running_mean if norm is None else norm.factor)
