"""SatNL: weights through a saturating odd function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.nn.sites import named_layers
from gradl1_fast.training.methods.interface import Family, Method, Variant
from gradl1_fast.training.methods.weights import parametrize_all, unparametrized

__all__ = ["Saturated", "Saturation"]


class Saturated(nn.Module):
    """A parametrization ``W = g tanh(V)``, with a constant gain g.

    The gain is 1, or 1.25 times the largest magnitude of each output channel where that is more than 0.8, so
    that the weight that was there before can be represented.

    Args:
        weight: the weight before, of shape ``(out, ...)`` with the output channels on axis ``axis``.
        axis: of the output channels.
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
        """Return the latent weight of a weight within the gain."""
        return torch.atanh(weight / self.gain)


class Saturation(Method):
    """Weights are ``g tanh(V)``, and V is trained.

    The function is odd and bounded, and its slope falls, so large weights are drawn together: the kurtosis of
    tanh of a normal variable with a standard deviation of 0.8 is that of a uniform one. Each layer begins at
    the weight that it had. After training the weights are tanh's values. It adds no penalty. Reconstruction:
    that the function is tanh is from a secondary source, the gain for large weights is not.

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
    distributed = False  # ranks and recomputation read the parameters of the model before it is changed
    variants = (Variant("satnl", "SatNL: weights through tanh"),)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = named_layers(model)
        if not self.layers:
            raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
        parametrize_all(self.layers, lambda name, layer: Saturated(layer.weight, layer.out_axis))

    def close(self) -> None:
        """Leave the values of tanh as the weights."""
        for layer in self.layers.values():
            unparametrized(layer)
