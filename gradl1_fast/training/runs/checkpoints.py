"""Checkpoints: the last whole state of a training, from which it goes on after a kill at any moment.

A checkpoint is a folder ``step-N`` with ``weights.safetensors``, ``state.safetensors`` and ``state.json``. It
is written under another name, brought to the disk and renamed, so that a folder of this name is complete;
then older ones are removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast import _files
from gradl1_fast.training.loop.epoch import Epoch
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs.state_file import VALUES, read_state, write_state
from gradl1_fast.training.runs.weights_file import load_weights, save_weights

__all__ = ["latest", "load", "save"]

_PREFIX, _DIGITS = "step-", 12
_PARTIAL = ".partial"
_UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


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
    write_state(partial, {**state, "rows": rows})
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
    state = read_state(path)
    file = path / VALUES
    _go_to(file, state, trainer)
    _check(file, state, trainer)
    load_weights(trainer.model, path / "weights.safetensors")
    try:
        trainer.load_state_dict(state)
    except _UNFIT as error:
        raise ValueError(f"{file}: does not fit this training: {error!s:.300}") from error
    return list(state["rows"])


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]


def _go_to(file: Path, state: dict[str, Any], trainer: Trainer) -> None:
    """Check the place in the training, and let the trainer have the method of that epoch."""
    for name, end in (("epoch", trainer.config.training.epochs), ("step", trainer.steps)):
        value = state.get(name)
        if name in state and (type(value) is not int or not 0 <= value <= end):
            raise ValueError(
                f"{file}: entry {name!r} must be a whole number from 0 to {end}, got {value!r:.80}"
            )
    trainer.go_to(state.get("epoch", trainer.epoch))


def _check(file: Path, state: dict[str, Any], trainer: Trainer) -> None:
    """Check names, types, shapes and finiteness against what this training would write itself."""
    like = {**trainer.state_dict(), "rows": []}
    _same_keys(file, "", state, like)
    for name in ("optimizer", "schedule", "scaler", "average", "objective"):
        _same_keys(file, f"{name}.", state[name], like[name])
    for key, value in like["average"].items():
        _same_tensor(file, f"average.{key}", state["average"][key], value)
    _same_tensor(file, "order", state["order"], like["order"])
    _check_optimizer(file, state["optimizer"], trainer)
    _check_measured(file, state)


def _check_optimizer(file: Path, found: dict[str, Any], trainer: Trainer) -> None:
    """Check the state of each parameter, and make its key the number that JSON has as a string."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    numbers = {str(index): index for index in range(len(parameters))}
    if not isinstance(found["state"], dict) or not all(isinstance(s, dict) for s in found["state"].values()):
        raise ValueError(f"{file}: entry 'optimizer.state' must be a dictionary of dictionaries")
    unknown = found["state"].keys() - numbers
    if unknown:
        raise ValueError(
            f"{file}: entry 'optimizer.state' refers to parameter {min(unknown):.80}, which does not exist"
        )
    found["state"] = {numbers[key]: state for key, state in found["state"].items()}
    for index, state in found["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape not in ((), parameters[index].shape):
                raise ValueError(
                    f"{file}: entry 'optimizer.state.{index}.{name}' must have shape "
                    f"{tuple(parameters[index].shape)}, got {tuple(value.shape)}"
                )


def _check_measured(file: Path, state: dict[str, Any]) -> None:
    """Check what was seen of the present epoch, on each rank, and the metrics of those before."""
    if not isinstance(state["seen"], list):
        raise ValueError(f"{file}: entry 'seen' must be a list")
    for rank, seen in enumerate(state["seen"]):
        name = f"seen.{rank}"
        _same_keys(file, f"{name}.", seen, Epoch().state_dict())
        for key in ("losses", "penalties"):
            _same_tensor(file, f"{name}.{key}", seen[key], torch.empty(state["step"]))
        if not isinstance(seen["parts"], dict):
            raise ValueError(f"{file}: entry '{name}.parts' must be a dictionary")
        _same_keys(file, f"{name}.counts.", seen["counts"], seen["parts"])
        for key, part in seen["parts"].items():
            if not isinstance(part, Tensor) or part.dim() or not part.is_floating_point():
                raise ValueError(f"{file}: entry '{name}.parts.{key}' must be a tensor of one number")
        if not all(type(count) is int and count > 0 for count in seen["counts"].values()):
            raise ValueError(f"{file}: entry '{name}.counts' must hold whole numbers above 0")
        if type(seen["seconds"]) is not float:
            raise ValueError(f"{file}: entry '{name}.seconds' must be a number")
    rows = state["rows"]
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError(f"{file}: entry 'rows' must be a list of dictionaries from names to numbers")


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        type(name) is str and type(value) in (int, float) for name, value in row.items()
    )


def _same_keys(file: Path, where: str, found: Any, like: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(
            f"{file}: entry {where.rstrip('.')!r} must be a dictionary, got {type(found).__name__}"
        )
    for what, keys in (("missing", like.keys() - found), ("unknown", found.keys() - like)):
        if keys:
            raise ValueError(f"{file}: {what} entries: {check.some(f'{where}{key}' for key in keys)}")


def _same_tensor(file: Path, name: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (like.shape, like.dtype):
        got = f"{found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.80}"
        raise ValueError(
            f"{file}: entry {name!r} must be {like.dtype} of shape {tuple(like.shape)}, got {got}"
        )
