"""What a converted model quantizes, and what it leaves alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gradl1_fast._checks import MAX_BITS
from gradl1_fast.nn.act import Act2d
from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.nn.graphs import operation_of
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.trace import PLAIN_LAYERS

__all__ = ["Report", "report", "unconverted_layers"]

_FUNCTIONS = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    nn.functional.linear,
    torch.matmul,
    torch.bmm,
    torch.einsum,
    operator.matmul,
    "matmul",
    "bmm",
}

_NORMALISATIONS = {f"torch.nn.modules.{home}" for home in ("batchnorm", "instancenorm", "normalization")}


@dataclass(repr=False)
class Report:
    """Rows of text by section; ``print``, or a notebook, shows them as tables.

    Attributes:
        layers: name, class, shape of the weight, bits of the weight, ranges of the weight.
        quantizers: name, bits, range, whether a penalty counts the tensor.
        unquantized: name and kind of each operation that computes in float at any width.
    """

    layers: list[tuple[str, ...]] = field(default_factory=list)
    quantizers: list[tuple[str, ...]] = field(default_factory=list)
    unquantized: list[tuple[str, ...]] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the three tables."""
        return "\n\n".join(
            (
                _table("Layers", ("name", "class", "weight", "bits", "ranges"), self.layers),
                _table("Activation quantizers", ("name", "bits", "range", "penalized"), self.quantizers),
                _table("Operations left unquantized", ("name", "operation"), self.unquantized),
            )
        )


def report(model: nn.Module) -> Report:
    """Return every layer, its quantizers, and every operation that stays in float, to be printed.

    Args:
        model: a converted model, or one that contains layers of this library.
    """
    result = Report()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            result.layers.append(_layer_row(name, module))
        if isinstance(module, ActivationQuantizer):
            result.quantizers.append(_quantizer_row(name, module))
    result.unquantized.extend(_unquantized(model))
    return result


def unconverted_layers(model: nn.Module) -> list[str]:
    """Return the layers with weights that take part in the forward pass as they were."""
    if not isinstance(model, ConvertedModel):
        return [f"{name} ({type(m).__name__})" for name, m in model.named_modules() if _is_left(m)]
    return [
        f"{node.target if node.op == 'call_module' else node.name} ({_kind(model, node)})"
        for node in model.graph.nodes
        if _hides_a_layer(model, node)
    ]


def _hides_a_layer(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return operation_of(node) in _FUNCTIONS
    return any(_is_left(m) for m in model.get_submodule(str(node.target)).modules())


def _is_left(module: nn.Module) -> bool:
    """Return whether a layer of PyTorch's, or one derived from a convolution, has a weight as it was."""
    if isinstance(module, PLAIN_LAYERS):
        return not isinstance(module, QuantizedLayer)
    home = type(module).__module__
    matrices = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    return matrices and home.startswith("torch.nn.modules.") and home not in _NORMALISATIONS


def _unquantized(model: nn.Module) -> Iterator[tuple[str, ...]]:
    ours = (QuantizedLayer, BatchNormAct2d, Act2d, ActivationQuantizer, WeightQuantizer)
    graph_model = next((m for m in model.modules() if isinstance(m, ConvertedModel)), None)
    if graph_model is None:
        for name, module in model.named_modules():
            if not isinstance(module, ours) and not list(module.children()):
                yield name, type(module).__name__
        return
    for node in graph_model.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        if node.op != "call_module" or not isinstance(graph_model.get_submodule(str(node.target)), ours):
            yield node.name, _kind(graph_model, node)


def _kind(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _layer_row(name: str, layer: QuantizedLayer) -> tuple[str, ...]:
    quantizer = layer.weight_quantizer
    ranges = "per tensor" if quantizer.axis is None else "per channel"
    # Read from an any-bit file, a layer has codes in the place of its weight.
    weight: Any = quantizer.codes if layer.weight is None else layer.weight
    return name, type(layer).__name__, "x".join(map(str, weight.shape)), _bits(quantizer.bits), ranges


def _quantizer_row(name: str, quantizer: ActivationQuantizer) -> tuple[str, ...]:
    ends = "not calibrated"
    if quantizer.low is not None:
        low, high = quantizer.range_at(quantizer.bits or MAX_BITS)
        ends = f"{float(low):.4g} to {float(high):.4g}"
    return name, _bits(quantizer.bits), ends, "no: network input" if quantizer.probe is None else "yes"


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return f"{title}: none"
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]
    return "\n".join((title, lines[0], "  ".join("-" * w for w in widths), *lines[1:]))
