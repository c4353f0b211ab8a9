"""The cost of a network at given widths: bytes of weights, and bit operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradl1_fast._shown import Grid, Shown
from gradl1_fast.conversion.by_function import quantizable_layers
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization._modes import Forward, call, evaluation
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["Costs", "costs"]

FLOAT_BITS = 32


@dataclass(frozen=True, repr=False)
class Costs(Shown):
    """What the layers of a network cost, by name; ``print``, or a notebook, shows it as a table.

    Attributes:
        weights: the number of weights; a shared parameter counts only for its first layer.
        products: the number of multiplications of a weight with an input for one example, 0 for an
            embedding; empty if no example was given.
        inputs: the site of the layer's input; None for an embedding.
    """

    weights: dict[str, int]
    products: dict[str, int]
    inputs: dict[str, str | None]

    def _parts(self) -> Iterator[Grid]:
        rows = [
            (name, f"{n:,}", f"{self.products[name]:,}" if name in self.products else "", self._input(name))
            for name, n in self.weights.items()
        ]
        yield Grid(("layer", "weights", "products", "input"), rows, right=(1, 2))

    def _input(self, name: str) -> str:
        return self.inputs.get(name) or ""

    def size(self, w: Mapping[str, int | None]) -> float:
        """Return the bytes of the weights at the given widths, without scales; float counts as 32 bits."""
        return sum(n * (w[name] or FLOAT_BITS) for name, n in self.weights.items()) / 8

    def bit_operations(self, w: Mapping[str, int | None], a: Mapping[str, int | None]) -> float:
        """Return the sum over products of weight bits times input bits; float counts as 32 bits.

        Source: van Baalen et al. 2020, arXiv 2005.07093, equation 14.
        """
        return sum(
            n * (w[name] or FLOAT_BITS) * (a.get(self.inputs[name] or "") or FLOAT_BITS)
            for name, n in self.products.items()
        )


def costs(model: nn.Module, example: Any = None, *, forward: Forward | None = None) -> Costs:
    """Count the weights of a converted model and, by running an example, its multiplications.

    Weights that stay in float at every width are not counted: those outside of this library's layers, and
    those that only functions read.

    Args:
        model: a converted model.
        example: a batch as for :func:`gradl1_fast.calibrate`; the result is for one example. If None,
            multiplications are not counted.
        forward: as for :func:`gradl1_fast.calibrate`.

    Raises:
        ValueError: the model has no layers of this library.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)))
        >>> costs = gl.costs(model, torch.randn(1, 4))
        >>> costs.weights, costs.size({"0": 4}), costs.products
        ({'0': 8}, 4.0, {'0': 8})
    """
    if not named_layers(model):
        raise ValueError("the model has no layers of this library: call gradl1_fast.convert(model) first")
    refuse_sliced(model, "costs")
    layers = quantizable_layers(model)
    first: dict[int, str] = {}
    for name, layer in layers.items():
        first.setdefault(_identity(layer), name)
    weights = {
        name: used_weight(layer).numel() if first[_identity(layer)] == name else 0
        for name, layer in layers.items()
    }
    products = {} if example is None else _products(model, layers, example, forward)
    return Costs(weights, products, _inputs(model, layers))


def _identity(layer: QuantizedLayer) -> int:
    """Return a key that layers with a shared weight have in common."""
    return id(layer) if layer.is_computed else id(layer.weight)


def _products(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], example: Any, forward: Forward | None
) -> dict[str, int]:
    counts = dict.fromkeys(layers, 0)
    names = {id(layer): name for name, layer in layers.items()}

    def count(layer: Any, args: Any, kwargs: Any, y: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        counts[names[id(layer)]] += _products_of(layer, x, y)

    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers.values()]
    try:
        with evaluation(model):
            call(model, example, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _products_of(layer: QuantizedLayer, x: Any, y: Any) -> int:
    """Return the number of multiplications for one example."""
    if isinstance(layer, QEmbedding):
        return 0
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return x[0].numel() * layer.weight[0].numel()
    weight = layer.weight
    return y[0].numel() * weight.numel() // weight.shape[layer.out_axis]


def _inputs(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, str | None]:
    names = {id(quantizer): name for name, quantizer in named_quantizers(model).items()}
    return {name: names.get(id(layer.input_quantizer)) for name, layer in layers.items()}
