"""Whether a penalty will differentiate the next forward pass of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Arming", "armings_of", "asking", "is_armed", "is_recomputing"]

Planner = Callable[[nn.Module], None]


class Arming:
    """A switch that the layers and sites of a converted model share.

    While it is off, a layer at float width runs the code of its torch twin and nothing else. While it is
    on, layers use operators with a fast second derivative, and planned containers run their plans. A
    forward pass that was made while it was off is still exact for weights, whose ordinary operators are
    twice differentiable.

    A penalty changes it for the next forward pass as soon as it was called. What a checkpointed region
    computes again in the backward pass after that is computed as it was the first time.

    Attributes:
        planner: called with the model when a penalty is made for it; installs plans. None without plans.
        has_run: whether a layer has run while armed since a penalty was called.
        passes: number of armed forward passes so far; those before one call of a penalty count as one.
        notes: what is known of tensors that passed through a site, see :mod:`gradl1_fast.nn.sharing`. A
            result may lead back to its tensor through a graph that nobody differentiates, so that notes are
            dropped as soon as a forward pass is over.
        asked: what a penalty that is differentiating a loss asks for: gradients of ``"weights"`` and sites,
            or of sites alone, ``"activations"``; otherwise ``"all"``, whatever somebody might ask for.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.planner = planner
        self.has_run = False
        self.passes = 0
        self.notes: Any = WeakIdKeyDictionary()
        self.asked = "all"
        self._wanted: dict[int, tuple[bool, bool]] = {}
        self._now = self._before = (False, False)

    def set(self, penalty: int, armed: bool, measuring: bool) -> None:
        """Say what one penalty, which is known by a number of its own, wants of the next forward pass."""
        self._wanted[penalty] = armed, measuring
        if not armed:
            del self._wanted[penalty]
        wanted = self._wanted.values()
        self.notes.clear()
        self._before = self._now
        self._now = any(a for a, _ in wanted), any(m for _, m in wanted)

    def note_run(self) -> int:
        """Take note that a layer runs while armed; return the number of the forward pass."""
        if not self.has_run and not is_recomputing():
            self.has_run = True
            self.passes += 1
            self.notes.clear()
        return self.passes

    @property
    def armed(self) -> bool:
        """Whether any penalty is waiting for the present forward pass."""
        return self._state()[0]

    @property
    def measuring(self) -> bool:
        """Whether any penalty measures activations in the present forward pass."""
        return self._state()[1]

    def _state(self) -> tuple[bool, bool]:
        if self._now != self._before and not torch.compiler.is_compiling():
            if is_recomputing():
                return self._before
            self._before = self._now  # a forward pass has begun
        return self._now

    def __reduce__(self) -> Any:
        """Copy and pickle as a switch that is off: no penalty waits for the copy."""
        return Arming, (self.planner,)


def armings_of(modules: Iterable[nn.Module]) -> Iterator[Arming]:
    """Yield each switch among modules once."""
    seen: set[int] = set()
    for module in modules:
        arming = vars(module).get("arming")
        if isinstance(arming, Arming) and id(arming) not in seen:
            seen.add(id(arming))
            yield arming


@contextlib.contextmanager
def asking(armings: Iterable[Arming], asked: str) -> Iterator[None]:
    """Say what the gradients that are computed inside the block are needed for; see :class:`Arming`."""
    armings = list(armings)
    if torch.compiler.is_compiling():
        yield
        return
    for arming in armings:
        arming.asked = asked
    try:
        yield
    finally:
        for arming in armings:
            arming.asked = "all"


def is_recomputing() -> bool:
    """Return whether a checkpointed region is being computed again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def is_armed(arming: Arming) -> bool:
    """Return whether the present forward pass will be differentiated twice."""
    return arming.armed and torch.is_grad_enabled()
