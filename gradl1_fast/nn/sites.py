"""The layers and sites of a model by name. At a site, the input of a layer is quantized and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["name_sites", "named_layers", "named_quantizers", "replaced_at", "sites_of_layers"]


def named_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers of this library by name; a shared layer appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def sites_of_layers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield the name and the quantizer of each layer's site; a shared site is yielded once per layer."""
    for name, layer in named_layers(model).items():
        if layer.input_quantizer is not None:
            yield f"{name}.input".removeprefix("."), layer.input_quantizer


def named_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers by the name of their site; a shared site appears once.

    A site is named after the first layer that it feeds. A quantizer without a layer is named by its path.
    """
    quantizers: dict[int, tuple[str, ActivationQuantizer]] = {}
    for name, quantizer in sites_of_layers(model):
        quantizers.setdefault(id(quantizer), (name, quantizer))
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            quantizers.setdefault(id(module), (name, module))
    return dict(quantizers.values())


def name_sites(model: nn.Module) -> None:
    """Set the name of each quantizer, for messages."""
    for name, quantizer in named_quantizers(model).items():
        quantizer.name = name


@contextlib.contextmanager
def replaced_at(
    quantizers: Mapping[str, ActivationQuantizer], replace: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Replace the tensor of each site by ``replace(name, tensor)`` inside the block.

    The function is called once per tensor, also if several layers read it. Other readers are not affected.
    """
    try:
        for name, quantizer in quantizers.items():
            quantizer.move = partial(replace, name)
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.move = None
            quantizer.arming.notes.clear()  # a note whose result is a view keeps both tensors alive
