"""Weights in a file of their own: safetensors, checked entry by entry before the model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast import _files
from gradl1_fast._extras import install
from gradl1_fast.nn.state_dicts import load_entries

__all__ = [
    "check_entries",
    "load_weights",
    "put_weights",
    "read_weights",
    "require_safetensors",
    "save_weights",
]

FORMAT = {"format": "gradl1_fast.weights", "version": "1"}


def save_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], facts: Mapping[str, str] | None = None
) -> None:
    """Write a state dict; the file is replaced whole or not at all.

    Args:
        state: as ``model.state_dict()`` gives it.
        path: of the file, customarily ending in ``.safetensors``.
        facts: texts to be kept in the file beside the tensors.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    # a clone each: the format refuses tensors that share memory, as tied weights do
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    data = require_safetensors().torch.save(tensors, metadata={**FORMAT, **(facts or {})})
    _files.write_bytes(path, data)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_weights` wrote; every entry is checked before the model is changed.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: the file is not a complete file of weights, or an entry is missing, unknown, of a wrong
            shape or type, or not finite. The message names the file and the entry.
    """
    put_weights(model, path, read_weights(path)[0])


def put_weights(model: nn.Module, path: str | os.PathLike[str], entries: Mapping[str, Tensor]) -> None:
    """Load what :func:`read_weights` read from ``path``; the errors are those of :func:`load_weights`."""
    check_entries(path, entries, model.state_dict())
    load_entries(model, entries)


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the texts of a file of weights; nothing in it is executed."""
    safetensors = require_safetensors()
    with open(path, "rb"):  # the library's own message for a file that cannot be read names no file
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt safetensors file: {error}") from error
    for key, value in FORMAT.items():
        if facts.get(key) != value:
            raise ValueError(f"{path}: its {key} must be {value!r}, the file says {facts.get(key)!r}")
    return entries, facts


def check_entries(
    path: str | os.PathLike[str], entries: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check names, shapes, types and finiteness of the entries of a file."""
    for what, keys in (("missing", expected.keys() - entries), ("unknown", entries.keys() - expected)):
        if keys:
            raise ValueError(f"{path}: {what} entries for this model: {check.some(keys)}")
    for key, value in entries.items():
        like = expected[key]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{path}: entry {key!r} must be {like.dtype} of shape {tuple(like.shape)}, "
                f"got {value.dtype} of {tuple(value.shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path}: entry {key!r} holds NaN or infinity")


def require_safetensors() -> Any:
    """Return the package; an ImportError says what to install where it is missing."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"files of weights need safetensors: {install('train')}") from error
    return safetensors
