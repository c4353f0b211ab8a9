"""Checkpoints: the last whole state of a training, from which it goes on after a kill at any moment.

A checkpoint is a folder ``step-N`` with ``weights.safetensors`` and ``state.pt``. It is written under
another name, brought to the disk and renamed, so that what has the name is whole; then older ones go.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _files
from gradl1_fast.training.trainer import Trainer
from gradl1_fast.training.weights_file import load_weights, save_weights

__all__ = ["latest", "load", "save"]

_PREFIX, _DIGITS = "step-", 12
_PARTIAL = ".partial"
_BROKEN = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
)


def save(folder: Path, trainer: Trainer, state: dict[str, Any], rows: list[dict[str, float]]) -> None:
    """Write a checkpoint, then remove the others.

    Args:
        folder: of the checkpoints.
        trainer: whose model's state is kept.
        state: its ``state_dict()``, which is asked for on every rank.
        rows: the metrics of the epochs that are over.

    Raises:
        OSError: the folder cannot be written to.
    """
    target, partial = folder / f"{_PREFIX}{trainer.steps_done:0{_DIGITS}}", folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(trainer.model.state_dict(), partial / "weights.safetensors")
    buffer = io.BytesIO()
    torch.save({**state, "rows": rows}, buffer)
    _files.write_bytes(partial / "state.pt", buffer.getvalue())
    if target.exists():  # the training stood at this very step before: the same state
        shutil.rmtree(partial)
        return
    os.replace(partial, target)
    _files.to_disk(folder)
    for other in _all(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder, or None."""
    return max(_all(folder), default=None)


def load(path: Path, trainer: Trainer) -> list[dict[str, float]]:
    """Give a trainer and its model the state of a checkpoint; return the metrics so far.

    Nothing in the files is executed, and what they hold is checked before it is used.

    Raises:
        ValueError: a file is damaged, or does not fit this training; the message names file and entry.
        OSError: it cannot be read.
    """
    file = path / "state.pt"
    state = _read(file, trainer.ranks.device)
    _check(file, state, trainer)
    load_weights(trainer.model, path / "weights.safetensors")
    try:
        trainer.load_state_dict(state)
    except _BROKEN as error:
        raise ValueError(f"{file}: does not fit this training: {error}") from error
    return list(state["rows"])


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    with open(file, "rb") as opened:
        try:
            state = torch.load(opened, map_location=device, weights_only=True)
        except _BROKEN as error:
            raise ValueError(f"{file}: not a whole file of tensors and numbers: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: must hold a dictionary, got {type(state).__name__}")
    return state


def _check(file: Path, state: dict[str, Any], trainer: Trainer) -> None:
    """Check names, types, shapes and finiteness against what this training would write itself."""
    like = {**trainer.state_dict(), "rows": []}
    _same_keys(file, "", state, like)
    for name, end in (("epoch", trainer.config.training.epochs), ("step", trainer.steps)):
        if type(state[name]) is not int or not 0 <= state[name] <= end:
            raise ValueError(
                f"{file}: entry {name!r} must be a whole number from 0 to {end}, got {state[name]!r}"
            )
    for name in ("optimizer", "schedule", "scaler", "average", "objective"):
        _same_keys(file, f"{name}.", state[name], like[name])
    for key, value in like["average"].items():
        _same_tensor(file, f"average.{key}", state["average"][key], value)
    _same_tensor(file, "order", state["order"], like["order"])
    measured = ("seen", "rows")  # a loss may be infinite: with float16 such a step is skipped
    for name, value in _leaves("", {key: value for key, value in state.items() if key not in measured}):
        if not _is_finite(value):
            raise ValueError(f"{file}: entry {name!r} holds NaN or infinity")
    _check_optimizer(file, state["optimizer"], trainer)


def _check_optimizer(file: Path, found: dict[str, Any], trainer: Trainer) -> None:
    parameters = list(trainer.model.parameters())
    for index, state in found["state"].items():
        if index not in range(len(parameters)):
            raise ValueError(f"{file}: entry 'optimizer.state' speaks of parameter {index!r}; there is none")
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape not in ((), parameters[index].shape):
                raise ValueError(
                    f"{file}: entry 'optimizer.state.{index}.{name}' must have shape "
                    f"{tuple(parameters[index].shape)}, got {tuple(value.shape)}"
                )


def _same_keys(file: Path, where: str, found: Any, like: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(
            f"{file}: entry {where.rstrip('.')!r} must be a dictionary, got {type(found).__name__}"
        )
    for what, keys in (("missing", like.keys() - found), ("unknown", found.keys() - like)):
        if keys:
            raise ValueError(
                f"{file}: {what} entries: {', '.join(where + str(key) for key in sorted(keys, key=str))}"
            )


def _same_tensor(file: Path, name: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (like.shape, like.dtype):
        got = f"{found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(
            f"{file}: entry {name!r} must be {like.dtype} of shape {tuple(like.shape)}, got {got}"
        )


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{where}.{key}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(f"{where}.{place}", inner)
    else:
        yield where, value


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)
