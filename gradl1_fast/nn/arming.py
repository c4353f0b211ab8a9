"""Whether a penalty will differentiate the next forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Arming", "armings_of", "is_armed"]

Planner = Callable[[nn.Module], None]


class Arming:
    """A switch that the layers of a converted model share.

    While it is off, a layer at float width runs the code of its torch twin and nothing else. While it is
    on, layers use operators with a fast second derivative, and planned containers run their plans. A
    forward pass that was made while it was off is still exact for weights, whose ordinary operators are
    twice differentiable.

    Attributes:
        armed: whether any penalty is waiting for the next forward pass.
        planner: called with the model when a penalty is made for it; installs plans. None without plans.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.armed = False
        self.planner = planner
        self._penalties: set[int] = set()

    def set(self, penalty: int, armed: bool) -> None:
        """Arm or disarm on behalf of one penalty, which is known by a number of its own."""
        (self._penalties.add if armed else self._penalties.discard)(penalty)
        self.armed = bool(self._penalties)

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


def is_armed(arming: Arming) -> bool:
    """Return whether the present forward pass will be differentiated twice."""
    return arming.armed and torch.is_grad_enabled()
