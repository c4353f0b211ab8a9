"""What a training loop knows of an objective, and what every objective needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from gradl1_fast.nn.sites import named_layers

__all__ = ["Closure", "Objective", "Scale", "Terms", "factor_of", "identity", "trainable_weights"]

Closure = Callable[[], Tensor]
Scale = Callable[[Tensor], Tensor]


def identity(loss: Tensor) -> Tensor:
    """Return the loss as it is: no scaling."""
    return loss


@dataclass(frozen=True)
class Terms:
    """What one step was trained on: scalars without graph, in units of the loss, whatever its scaling.

    Attributes:
        loss: the mini-batch mean loss.
        penalty: what the objective adds to it.
        parts: what the penalty is made of, by name and before coefficients, where it has parts.
    """

    loss: Tensor
    penalty: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is minimised: the loss, and what a method adds to it. Made for one converted model.

    Attributes:
        name: of the method.
        strength: a factor of the penalty, 1 at first; a warm-up raises it from 0.
    """

    name: str
    strength: float

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """Add the gradient of the whole objective to each parameter's ``grad``.

        Args:
            closure: runs the forward pass and returns the mini-batch mean loss with its graph. It may
                be called twice, and then sees the same numbers of torch's default generators.
            scale: multiplies a loss by a number, such as ``GradScaler.scale`` does; gradients are
                multiplied alike.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a training that resumes must restore."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        if state:
            raise ValueError(f"the objective {self.name!r} has no state, got {', '.join(state)}")

    def close(self) -> None:
        """Undo what the objective has changed in the model."""


def factor_of(scale: Scale, loss: Tensor) -> Tensor:
    """Return the number by which ``scale`` multiplies."""
    return scale(torch.ones_like(loss.detach()))


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are quantized and require a gradient, each parameter once.

    Raises:
        ValueError: there is none.
    """
    weights: dict[str, Tensor] = {}
    for name, layer in named_layers(model).items():
        known = any(layer.weight is weight for weight in weights.values())
        if layer.weight.requires_grad and not known:
            weights[f"{name}.weight" if name else "weight"] = layer.weight
    if not weights:
        raise ValueError(
            "the model has no quantizable weight that requires a gradient: call gradl1_fast.convert first"
        )
    return weights
