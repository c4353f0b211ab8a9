"""What a network costs at given widths: bytes of weights, and operations on bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization._modes import evaluation
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["Costs", "costs"]

FLOAT_BITS = 32


@dataclass(frozen=True)
class Costs:
    """What the layers of a network cost, by name.

    Attributes:
        weights: number of weights; where layers share a parameter, 0 at all but the first.
        products: multiplications of a weight with an input, for one example; empty without an input.
        inputs: the quantizer of the layer's input; None where the input stays in float.
    """

    weights: dict[str, int]
    products: dict[str, int]
    inputs: dict[str, str | None]

    def size(self, w: Mapping[str, int | None]) -> float:
        """Return the bytes of the weights at widths by layer; float takes 32 bits. Scales are not counted."""
        return sum(n * (w[name] or FLOAT_BITS) for name, n in self.weights.items()) / 8

    def bit_operations(self, w: Mapping[str, int | None], a: Mapping[str, int | None]) -> float:
        """Return the sum of products, each times the bits of weight and input; float takes 32 bits.

        Source: van Baalen et al. 2020, arXiv 2005.07093, equation 14.
        """
        return sum(
            n * (w[name] or FLOAT_BITS) * (a.get(self.inputs[name] or "") or FLOAT_BITS)
            for name, n in self.products.items()
        )


def costs(model: nn.Module, example: Tensor | None = None) -> Costs:
    """Count the weights of a converted model and, by a pass over an example, its multiplications.

    Args:
        model: a converted model.
        example: a batch of inputs, of which one example is counted; None counts no multiplications.

    Raises:
        ValueError: the model has no layers of this library.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)))
        >>> found = gl.costs(model, torch.randn(1, 4))
        >>> found.weights, found.size({"0": 4}), found.products
        ({'0': 8}, 4.0, {'0': 8})
    """
    layers = named_layers(model)
    if not layers:
        raise ValueError("the model has no layers of this library: call gradl1_fast.convert(model) first")
    refuse_sliced(model, "costs")
    first = {id(layer.weight): name for name, layer in reversed(layers.items())}
    weights = {
        name: layer.weight.numel() if first[id(layer.weight)] == name else 0 for name, layer in layers.items()
    }
    products = {} if example is None else _products(model, layers, example)
    return Costs(weights, products, _inputs(model, layers))


def _products(model: nn.Module, layers: Mapping[str, QuantizedLayer], example: Tensor) -> dict[str, int]:
    found = dict.fromkeys(layers, 0)
    names = {id(layer): name for name, layer in layers.items()}

    def count(layer: Any, _args: Any, y: Tensor) -> None:
        found[names[id(layer)]] += y[0].numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in layers.values()]
    try:
        with evaluation(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _inputs(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, str | None]:
    names = {id(quantizer): name for name, quantizer in named_quantizers(model).items()}
    return {name: names.get(id(layer.input_quantizer)) for name, layer in layers.items()}
