"""The quantizable and trainable weights that methods work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers

__all__ = [
    "is_depthwise",
    "leaf_of",
    "name_of",
    "parametrize_all",
    "parametrized",
    "trainable_layers",
    "trainable_weights",
    "unparametrized",
]

M = TypeVar("M", bound=nn.Module)


def leaf_of(layer: QuantizedLayer) -> Tensor:
    """Return the weight of a layer if it is a parameter, or the parameter of its parametrization.

    If it is computed from several parameters, the first one is returned.
    """
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    originals: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return originals.original if hasattr(originals, "original") else originals.original0


def name_of(layer: str) -> str:
    """Return the name of the weight of a layer."""
    return f"{layer}.weight" if layer else "weight"


def trainable_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers with a quantizable weight that requires a gradient, by name; each weight once.

    Raises:
        ValueError: there is no such layer.
    """
    layers: dict[str, QuantizedLayer] = {}
    seen: set[int] = set()
    for name, layer in named_layers(model).items():
        leaf = leaf_of(layer)
        if leaf.requires_grad and id(leaf) not in seen:
            seen.add(id(leaf))
            layers[name] = layer
    if not layers:
        raise ValueError(
            "the model has no quantizable weight that requires a gradient: call gradl1_fast.convert first"
        )
    return layers


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of :func:`trainable_layers` by name, ``<layer>.weight``.

    A parametrized weight is computed by each call, unless ``parametrize.cached()`` is active.
    """
    return {name_of(name): layer.weight for name, layer in trainable_layers(model).items()}


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether each output channel of a layer reads a single input channel."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", None)


def parametrized(layer: QuantizedLayer, parametrization: nn.Module) -> None:
    """Compute the weight of a layer by a parametrization; the parameter stays the same object.

    Raises:
        ValueError: the weight is parametrized already, or is not a parameter of the layer.
    """
    if parametrize.is_parametrized(layer, "weight") or layer.is_computed:
        raise ValueError(
            f"{type(parametrization).__name__}: the weight of {type(layer).__name__} is computed already; "
            "one method at a time can parametrize a weight"
        )
    parametrize.register_parametrization(layer, "weight", parametrization)


def parametrize_all(
    layers: Mapping[str, QuantizedLayer], make: Callable[[str, QuantizedLayer], M | None]
) -> dict[str, M]:
    """Parametrize the weights of all layers, or of none if one fails.

    Args:
        layers: the layers, by name.
        make: returns the parametrization of a layer, or None to skip it.

    Returns:
        The parametrizations by the name of their layer.
    """
    parametrizations: dict[str, M] = {}
    try:
        for name, layer in layers.items():
            parametrization = make(name, layer)
            if parametrization is not None:
                parametrized(layer, parametrization)
                parametrizations[name] = parametrization
    except BaseException:
        for name in parametrizations:
            unparametrized(layers[name])
        raise
    return parametrizations


def unparametrized(layer: QuantizedLayer) -> None:
    """Restore a layer's weight as a parameter, with the current value of the parametrization.

    It is registered as the first parameter again, because the state of optimizers depends on the order.
    """
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        weight = layer._parameters.pop("weight")
        layer._parameters.update({"weight": weight, **_emptied(layer._parameters)})


def _emptied(values: dict[str, Any]) -> dict[str, Any]:
    """Remove and return all entries of a dictionary."""
    return {key: values.pop(key) for key in list(values)}
