"""Memory that tells on whoever reads it uninitialised, or writes outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 64
SENTINEL = 12345.0


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new memory with NaN, between guards that nobody may overwrite."""
    rooms: list[tuple[Tensor, Tensor]] = []

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(*args: Any, **kwargs: Any) -> Tensor:
            like = allocate(*args, **kwargs)
            room = torch.full((like.numel() + 2 * GUARD,), SENTINEL, dtype=like.dtype, device=like.device)
            rooms.append((room[:GUARD], room[like.numel() + GUARD :]))
            return room.as_strided(like.shape, like.stride(), GUARD).fill_(float("nan"))

        return inside

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    yield
    monkeypatch.undo()
    for fence in (fence for room in rooms for fence in room):
        assert (fence == torch.full_like(fence, SENTINEL)).all(), "written outside of an output"


@pytest.fixture(params=["large blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let small tensors fill many blocks, several of them in one program."""
    from gradl1_fast.backends.triton import _launch, _tiles, l1_norm

    if request.param == "small blocks":
        monkeypatch.setattr(_launch, "BLOCK", 64)
        monkeypatch.setattr(_tiles, "PROGRAMS", 3)
        monkeypatch.setattr(_tiles, "CHANNELS_IN_A_STRIP", 8)
        monkeypatch.setattr(l1_norm, "BLOCKS", 2)
        monkeypatch.setattr(l1_norm, "ARGUMENT_BYTES", 100)
    return request.param
