"""Records whether a penalty will differentiate the next forward pass of a model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Arming", "armings_of", "is_armed", "is_recomputing", "requesting"]

Planner = Callable[[nn.Module], None]


class Arming:
    """The arming state, shared by the layers and sites of a converted model.

    While the model is not armed, a layer in float runs only the code of its torch twin. While it is armed,
    layers use operators with a fast second derivative, and planned containers run their plans. A penalty on
    weights is exact for an unarmed forward pass too, because the ordinary operators are twice differentiable.

    A call of a penalty sets the state of the next forward pass. A checkpointed region that is recomputed in
    the backward pass afterwards uses the state of its original forward pass.

    Attributes:
        planner: called with the model when a penalty is created for it, to install plans; None without plans.
        has_run: whether a layer has run while armed since the last call of a penalty.
        passes: the number of armed forward passes; all passes before a call of a penalty count as one.
        notes: records of tensors that passed through a site, see :mod:`gradl1_fast.nn.sharing`. They are
            dropped at the end of a forward pass, because a result may keep its tensor alive through a graph.
        converted: returns the model that was converted, or None, also for a copy.
        known: its float layers that conversion saw, or that a warning named; see
            :mod:`gradl1_fast.nn.convertible`.
        requested: the gradients that a penalty requests while it differentiates a loss: ``"weights"`` for
            weights and sites, ``"activations"`` for sites only. ``"all"`` outside of a penalty.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.planner = planner
        self.has_run = False
        self.passes = 0
        self.notes: Any = WeakIdKeyDictionary()
        self.converted: Callable[[], nn.Module | None] = lambda: None
        self.known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.requested = "all"
        self._requests: dict[int, tuple[bool, bool]] = {}
        self._now = self._before = (False, False)

    def set(self, penalty: int, armed: bool, measuring: bool) -> None:
        """Set whether a penalty, given by its number, arms the next forward pass and measures sites in it."""
        self._requests[penalty] = armed, measuring
        if not armed:
            del self._requests[penalty]
        requests = self._requests.values()
        self.notes.clear()
        self._before = self._now
        self._now = any(a for a, _ in requests), any(m for _, m in requests)

    def note_run(self) -> int:
        """Record that a layer runs while armed; return the number of the forward pass."""
        if not self.has_run and not is_recomputing():
            self.has_run = True
            self.passes += 1
            self.notes.clear()
        return self.passes

    @property
    def armed(self) -> bool:
        """Whether any penalty will differentiate the current forward pass."""
        return self._state()[0]

    @property
    def measuring(self) -> bool:
        """Whether any penalty measures activations in the current forward pass."""
        return self._state()[1]

    def _state(self) -> tuple[bool, bool]:
        if self._now != self._before and not torch.compiler.is_compiling():
            if is_recomputing():
                return self._before
            self._before = self._now  # a forward pass has begun
        return self._now

    def __reduce__(self) -> Any:
        """Copy and pickle as not armed, since no penalty belongs to the copy."""
        return Arming, (self.planner,)


def armings_of(modules: Iterable[nn.Module]) -> Iterator[Arming]:
    """Yield the distinct arming states of modules."""
    seen: set[int] = set()
    for module in modules:
        arming = vars(module).get("arming")
        if isinstance(arming, Arming) and id(arming) not in seen:
            seen.add(id(arming))
            yield arming


@contextlib.contextmanager
def requesting(armings: Iterable[Arming], requested: str) -> Iterator[None]:
    """Set which gradients are requested inside the block; see :class:`Arming`."""
    armings = list(armings)
    if torch.compiler.is_compiling():
        yield
        return
    for arming in armings:
        arming.requested = requested
    try:
        yield
    finally:
        for arming in armings:
            arming.requested = "all"


def is_recomputing() -> bool:
    """Return whether a checkpointed region is being recomputed."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def is_armed(arming: Arming) -> bool:
    """Return whether the current forward pass will be differentiated twice."""
    return arming.armed and torch.is_grad_enabled()
