"""The tensors that a penalty measures: the weights used by layers, and the tensors at sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers

__all__ = ["Site", "WeightTerm", "activation_sites", "name_of_weight", "sites_of", "weight_terms"]


@dataclass(frozen=True)
class Site:
    """A penalised activation tensor.

    Attributes:
        name: the name of the site, ``<layer>.input``, after the first layer that it feeds.
        quantizer: the quantizer that owns the probe.
    """

    name: str
    quantizer: ActivationQuantizer

    @property
    def probe(self) -> Tensor:
        """The leaf whose gradient is the l1 norm."""
        return self.quantizer.probe


@dataclass(frozen=True)
class WeightTerm:
    """A penalised weight, as used by a layer.

    Attributes:
        name: the name of the term, ``<layer>.weight``.
        layer: the first layer that uses the weight.
        tensor: a parameter, or the weight that the last forward pass computed from parameters.
    """

    name: str
    layer: QuantizedLayer
    tensor: Tensor


def sites_of(model: nn.Module) -> list[Site]:
    """Return all sites, including those of the network's input."""
    return [Site(name, quantizer) for name, quantizer in named_quantizers(model).items()]


def activation_sites(model: nn.Module) -> list[Site]:
    """Return the sites that a penalty counts: all but those of the network's input."""
    return [site for site in sites_of(model) if not site.quantizer.is_input]


def weight_terms(layers: Mapping[str, QuantizedLayer]) -> list[WeightTerm]:
    """Return the distinct weights that require a gradient.

    For a layer that computes its weight, these are the weights of the last forward pass, if its graph is
    alive; the penalty then applies to the gradient of the computed weight.
    """
    terms: dict[int, WeightTerm] = {}
    for name, layer in layers.items():
        for tensor in _weights_of(layer):
            if tensor.requires_grad and id(tensor) not in terms:
                terms[id(tensor)] = WeightTerm(name_of_weight(name), layer, tensor)
    return list(terms.values())


def _weights_of(layer: QuantizedLayer) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():  # weights are not recorded; computed ones are refused
        return [] if layer.is_computed else [layer.weight]
    used = layer.weights_in_use()
    return used if layer.is_computed else [layer.weight, *used]


def name_of_weight(layer: str) -> str:
    """Return the name of the term of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"  # the model itself may be the layer
