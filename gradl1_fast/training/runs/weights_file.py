"""Weights in a file of their own: safetensors, checked entry by entry before the model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from gradl1_fast import _safetensors
from gradl1_fast._safetensors import TensorFile
from gradl1_fast.nn.state_dicts import load_entries

__all__ = ["load_weights", "open_weights", "put_weights", "require_safetensors", "save_weights"]

FORMAT = {"format": "gradl1_fast.weights", "version": "1"}
_KIND, _EXTRA = "files of weights", "train"


def save_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], facts: Mapping[str, str] | None = None
) -> None:
    """Write a state dict; the file is replaced whole or not at all.

    Args:
        state: as ``model.state_dict()`` gives it.
        path: of the file, customarily ending in ``.safetensors``.
        facts: strings to be kept in the file beside the tensors.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    _safetensors.save(path, state, {**FORMAT, **(facts or {})}, what=_KIND, extra=_EXTRA)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_weights` wrote; every entry is checked before the model is changed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a complete file of weights, or an entry is missing, unknown, of a wrong
            shape or type, or not finite. The message names the file and the entry.
    """
    with open_weights(path) as file:
        put_weights(model, file)


def open_weights(path: str | os.PathLike[str]) -> TensorFile:
    """Return a file of weights, open for reading; the errors are those of :func:`load_weights`."""
    file = TensorFile(path)
    try:
        file.check_metadata(FORMAT)
    except BaseException:
        file.close()
        raise
    return file


def put_weights(model: nn.Module, file: TensorFile) -> None:
    """Load the tensors of a file into a model; the errors are those of :func:`load_weights`."""
    load_entries(model, file.read_like(model.state_dict()))


def require_safetensors() -> None:
    """Raise an ImportError that says what to install if safetensors is missing."""
    _safetensors.require(_KIND, _EXTRA)
