"""The modules that conversion replaces, and a warning about those that were added after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from gradl1_fast._checks import some
from gradl1_fast.nn.arming import Arming, armings_of
from gradl1_fast.nn.foreign import is_conv1d_of_transformers
from gradl1_fast.nn.hooks import has_own_forward
from gradl1_fast.nn.layers import LAYERS, QuantizedLayer

__all__ = ["convertible", "is_holder", "warn_of_added_layers"]


def convertible(tree: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that conversion would replace; one that occurs twice is yielded twice."""
    return filter(_is_convertible, _own_modules(tree))


def is_holder(module: nn.Module) -> bool:
    """Return whether a module of torch.nn is only a container of modules."""
    return type(module) is nn.Module or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _own_modules(tree: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules, except those inside modules of torch.nn, which may read weights directly."""
    yield tree
    if is_holder(tree) or not type(tree).__module__.startswith("torch.nn"):
        for child in tree.children():
            yield from _own_modules(child)


def _is_convertible(module: nn.Module) -> bool:
    if isinstance(module, QuantizedLayer) or has_own_forward(module):
        return False
    if isinstance(module, nn.Embedding):
        # PyTorch's second derivative ignores scale_grad_by_freq; max_norm changes the weight in place, and
        # sparse changes the layout of gradients.
        return not (module.scale_grad_by_freq or module.sparse or module.max_norm is not None)
    return isinstance(module, tuple(LAYERS)) or is_conv1d_of_transformers(module)


def warn_of_added_layers(caller: str, model: nn.Module) -> None:
    """Warn once of each layer that was added to a converted model and needs another conversion.

    Layers that conversion left in float, and those that it replaced and that were put back, are deliberate.
    """
    names = {module: name for name, module in model.named_modules()}
    added = [m for arming in armings_of(names) for m in _added(arming) if m in names]
    if added:
        warnings.warn(
            f"{caller}: {some([names[m] for m in added])} was added after the conversion and is neither "
            "quantized nor penalised: call gradl1_fast.convert(model) again",
            stacklevel=3,
        )


def _added(arming: Arming) -> list[nn.Module]:
    """Return the layers that were added to the converted model since the last call."""
    model = arming.converted()
    added = [] if model is None else [m for m in dict.fromkeys(convertible(model)) if m not in arming.known]
    arming.known.update(added)
    return added
