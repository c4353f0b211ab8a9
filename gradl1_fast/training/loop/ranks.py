"""The processes of a distributed training, as torchrun starts them; one process is the common case."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "Ranks", "is_first", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: from 0; the first one writes the files.
        count: how many there are.
        device: of this process.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of a batch: every ``count``-th entry."""
        return batch[self.rank :: self.count] if self.count > 1 else batch

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is, or one whose gradients are averaged over the ranks."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.count

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks(0, 1, torch.device("cpu"))


@contextlib.contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for the ``with`` block; without torchrun be alone.

    Gradients go over nccl on GPUs and over gloo on CPUs.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None for a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    count, rank, place = (int(os.environ.get(key, default)) for key, default in _VARIABLES)
    chosen = _device(device, place if count > 1 else None)
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, count, chosen)
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Return whether this process is the one that writes, before the processes have joined."""
    return os.environ.get("RANK", "0") == "0"


_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


def _device(name: str | None, place: int | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", place) if device.type == "cuda" and place is not None else device
