"""The layers and sites of a model by name. A site is where the input of a layer is quantized and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["name_sites", "named_layers", "named_quantizers", "replaced_at", "sites_of_layers"]


def named_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers of this library by name, shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def sites_of_layers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield a name for the site of each layer, and its quantizer, once for every layer that shares it."""
    for name, layer in named_layers(model).items():
        if layer.input_quantizer is not None:
            yield f"{name}.input".removeprefix("."), layer.input_quantizer


def named_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers by the name of their site, shared ones once.

    A site is named after the first layer that it feeds, a quantizer that stands alone by its path.
    """
    found: dict[int, tuple[str, ActivationQuantizer]] = {}
    for name, quantizer in sites_of_layers(model):
        found.setdefault(id(quantizer), (name, quantizer))
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def name_sites(model: nn.Module) -> None:
    """Tell each quantizer its name, for messages."""
    for name, quantizer in named_quantizers(model).items():
        quantizer.name = name


@contextlib.contextmanager
def replaced_at(
    quantizers: Mapping[str, ActivationQuantizer], replace: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``replace(name, tensor)`` give the tensor that the layers of each site see, for the block.

    It is called once for a tensor, however many layers read it; what goes past the layers stays as it is.
    """
    try:
        for name, quantizer in quantizers.items():
            quantizer.move = partial(replace, name)
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.move = None
            quantizer.arming.notes.clear()  # one whose result is a view of its tensor keeps both alive
