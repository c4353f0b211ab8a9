"""SatNL: transforms weights by a saturating odd function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.nn.sites import named_layers
from gradl1_fast.training.methods.interface import Family, Method, Variant
from gradl1_fast.training.methods.weights import parametrize_all, unparametrized

__all__ = ["Saturated", "Saturation"]


class Saturated(nn.Module):
    """A parametrization ``W = g tanh(V)``, with a constant gain g.

    The gain is 1, or 1.25 times the largest magnitude of an output channel if this is more than 0.8, so that
    the initial weight can be represented.

    Args:
        weight: the initial weight, with output channels on axis ``axis``.
        axis: the axis of output channels.
    """

    gain: Tensor

    def __init__(self, weight: Tensor, axis: int = 0) -> None:
        super().__init__()
        others = [d for d in range(weight.dim()) if d != axis]
        largest = weight.detach().abs().amax(others, keepdim=True)
        self.register_buffer("gain", (1.25 * largest).clamp(min=1.0))

    def forward(self, latent: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        return self.gain * torch.tanh(latent)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the latent weight of a weight whose magnitude is below the gain."""
        return torch.atanh(weight / self.gain)


class Saturation(Method):
    """Training with weights ``g tanh(V)``, where V is trained.

    The function is odd and bounded with decreasing slope, so it compresses large weights: tanh of a normal
    variable with a standard deviation of 0.8 has the kurtosis of a uniform one. Each layer starts with its
    previous weight. After training, the weights are set to the transformed values. There is no penalty.
    Reconstruction: the choice of tanh is from a secondary source, the gain for large weights was chosen here.

    Args:
        model: a converted model.

    Raises:
        ValueError: the model is not converted, or a weight is computed by another parametrization.

    Source: Park et al. 2022 (SatNL), arXiv 2208.00338.
    """

    name = "satnl"
    text = "weights through tanh"
    source = "Park et al. 2022, arXiv 2208.00338"
    reconstruction = True
    family = Family.WEIGHTS
    distributed = False  # ranks and recomputation read the parameters before they are replaced
    variants = (Variant("satnl", "SatNL: weights through tanh"),)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = named_layers(model)
        if not self.layers:
            raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
        parametrize_all(self.layers, lambda name, layer: Saturated(layer.weight, layer.out_axis))

    def close(self) -> None:
        """Set the weights to the transformed values."""
        for layer in self.layers.values():
            unparametrized(layer)
