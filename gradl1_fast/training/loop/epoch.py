"""What the steps of an epoch were trained on, and the check that it is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.training.methods import Terms

__all__ = ["Epoch", "TrainingError", "check_finite"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says since when and what may help."""


@dataclass
class Epoch:
    """What the steps of an epoch were trained on, as far as it has come.

    Attributes:
        losses: without penalty, one a step.
        penalties: one a step.
        parts: of the penalty: the sum over the steps, by name.
        counts: over how many steps each was summed.
        seconds: that the steps took.
    """

    losses: list[Tensor] = field(default_factory=list)
    penalties: list[Tensor] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, terms: Terms) -> None:
        """Take note of a step."""
        self.losses.append(terms.loss.float())
        self.penalties.append(terms.penalty.float())
        for name, part in terms.parts.items():
            self.parts[name] = self.parts[name] + part if name in self.parts else part
            self.counts[name] = self.counts.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors, numbers and dictionaries."""
        lists = {"losses": _stacked(self.losses), "penalties": _stacked(self.penalties)}
        return {**vars(self), **lists}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Epoch:
        """Return what :meth:`state_dict` gave."""
        lists = {name: list(state[name].unbind()) for name in ("losses", "penalties")}
        return cls(**{**state, **lists})

    def since(self, first: int) -> Tensor:
        """Return losses and penalties of the steps from ``first`` on, counted from 0, of shape (2, steps)."""
        return torch.stack([torch.stack(self.losses[first:]), torch.stack(self.penalties[first:])])

    def mean_parts(self) -> dict[str, float]:
        """Return the mean of each part over the steps in which it was measured."""
        return {name: float(total) / self.counts[name] for name, total in self.parts.items()}


def check_finite(losses: Tensor, penalties: Tensor, epoch: int, first: int, *, skips: bool) -> None:
    """Raise if a step made the weights NaN or infinite.

    Args:
        losses: of consecutive steps.
        penalties: of the same steps.
        epoch: their epoch, from 0.
        first: the first of them, from 0.
        skips: a step whose gradients are not finite changes nothing, as with float16. There it is an error
            if not one of the steps is finite.

    Raises:
        TrainingError: names the first such step.
    """
    finite = losses.isfinite() & penalties.isfinite()
    if finite.any() if skips else finite.all():
        return
    place = int(finite.int().argmin())
    loss, penalty = float(losses[place]), float(penalties[place])
    what = f"penalty is {penalty}" if math.isfinite(loss) else f"loss is {loss}"
    raise TrainingError(
        f"the {what} since step {first + place + 1} of epoch {epoch + 1}; "
        "a smaller learning rate, or a smaller penalty with a longer warm-up, may help"
    )


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values).cpu() if values else torch.empty(0)
