"""A base class for penalties that are a function of the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Method
from gradl1_fast.training.methods.weights import name_of, trainable_layers

__all__ = ["WeightPenalty"]


class WeightPenalty(Method):
    """Adds a function of the weights to the loss.

    Subclasses implement :meth:`part` and :meth:`penalty`.

    Args:
        model: a converted model.

    Attributes:
        layers: the layers with penalised weights, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = trainable_layers(model)

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """Return the contribution of a weight, a scalar."""
        raise NotImplementedError

    def penalty(self, parts: Tensor) -> Tensor:
        """Return the penalty with its coefficient from the parts, of shape ``(layers,)``."""
        raise NotImplementedError

    def added(self, loss: Tensor) -> Tensor:
        """See :meth:`Method.added`."""
        parts = {name_of(name): self.part(layer.weight, layer) for name, layer in self.layers.items()}
        self.parts = {name: part.detach() for name, part in parts.items()}
        return self.strength * self.penalty(torch.stack(list(parts.values())))
