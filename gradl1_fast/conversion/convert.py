"""Conversion of a model: replaces its layers and leaves everything else unchanged."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import nn

from gradl1_fast.conversion.by_function import only_by_function
from gradl1_fast.conversion.left import left_in_float, size_of
from gradl1_fast.conversion.planned import install
from gradl1_fast.conversion.tracing import Part, parts_of, share_sites
from gradl1_fast.nn.arming import Arming
from gradl1_fast.nn.convertible import convertible
from gradl1_fast.nn.foreign import foreign_twin
from gradl1_fast.nn.layers import LAYERS, QuantizedLayer
from gradl1_fast.nn.references import redirect
from gradl1_fast.nn.sites import name_sites, named_layers
from gradl1_fast.nn.twins import copy_structure

__all__ = ["convert"]

_WORTH_A_WARNING = 0.05


def convert(model: nn.Module, *, per_channel: bool = False) -> nn.Module:
    """Return the model with layers that can be penalised and quantized on demand.

    The result is a copy of the same class that shares parameters and buffers with the model. Methods,
    attributes, hooks and state dicts are those of the original, and so are the outputs. Convolutions,
    transposed convolutions, linear layers and embeddings are replaced by subclasses such as
    :class:`gradl1_fast.QConv2d`. Subclasses of these layers are replaced too; their weight is quantized as
    their forward pass uses it. All layers and sites start in float.

    Each layer has a *site* at its input, where the tensor is quantized and measured by a penalty. Layers
    with the same input tensor share a site. Penalties do not count the site of the network's input.

    ``model`` is not changed, and an optimizer created for one works for the other. If ``model`` was converted
    before, only new layers are converted; without new layers it is returned unchanged.

    Args:
        model: the model, in any mode and on any device.
        per_channel: quantize each newly converted weight with one range per output channel. A warning says
            so if there is none and a weight has one range per tensor.

    Returns:
        The converted model. :func:`gradl1_fast.report` lists the parts that stay in float. A warning names
        them if they hold more than 5 % of the weights. Weights that only functions read, as in
        ``F.linear(x, self.qkv.weight)``, are among them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no layer to convert, has a lazy layer without a weight, or is, or contains,
            a module that is wrapped for distributed training (convert first, then wrap).

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> model = gl.convert(plain)
        >>> [type(layer).__name__ for layer in model]
        ['QConv2d', 'ReLU', 'QConv2d']
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(model(x), plain(x))  # float, as before
        True
        >>> model.state_dict().keys() == plain.state_dict().keys()
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradl1_fast.convert: the model must be a torch.nn.Module, got {model!r:.100}")
    _refuse_wrapped(model)
    _refuse_lazy(model)
    found = list(convertible(model))
    if not found:
        if any(isinstance(m, QuantizedLayer) for m in model.modules()):
            _warn_if_per_tensor(model, per_channel)
            return model
        raise ValueError(
            "gradl1_fast.convert: the model has no layer to convert (convolution, linear layer or embedding)"
        )
    arming = Arming(install)
    arming.known.update(found)
    converted = _replaced(copy_structure(model), per_channel, arming)
    for module in converted.modules():
        if isinstance(module, QuantizedLayer):
            module.use(arming)
    arming.converted = weakref.ref(converted)
    arming.known.update(convertible(converted))
    parts = list(parts_of(converted))
    share_sites(converted, parts)
    name_sites(converted)
    _warn_if_left_in_float(converted, parts)
    return converted


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"gradl1_fast.convert: {name or 'the model'} is wrapped in {type(module).__name__}; convert "
                "the model first, then wrap what convert returns"
            )


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(
                f"gradl1_fast.convert: {name or 'the model'} is lazy and has no weight yet; run a batch first"
            )


def _replaced(tree: nn.Module, per_channel: bool, arming: Arming) -> nn.Module:
    """Replace each layer by its twin; return the root, which may itself be a twin."""
    twins: dict[int, nn.Module] = {}
    for module in list(convertible(tree)):
        if id(module) not in twins:
            twin = _twin(module, per_channel, arming)
            if twin is not None:
                twins[id(module)] = twin
    for parent in list(tree.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = child if child is None else twins.get(id(child), child)
    root = twins.get(id(tree), tree)
    redirect(root, twins)
    return root


def _twin(module: nn.Module, per_channel: bool, arming: Arming) -> nn.Module | None:
    layer = LAYERS.get(type(module))
    if layer is not None:
        return layer.from_float(module, per_channel=per_channel, arming=arming)
    return foreign_twin(module, per_channel=per_channel, arming=arming)


def _warn_if_per_tensor(model: nn.Module, per_channel: bool) -> None:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    if per_channel and any(layer.weight_quantizer.axis is None for layer in layers):
        warnings.warn(
            "gradl1_fast.convert: the model was converted with one range per tensor, and per_channel=True "
            "applies only to new layers, of which it has none; convert the original model instead",
            stacklevel=3,
        )


def _warn_if_left_in_float(model: nn.Module, parts: Sequence[Part]) -> None:
    sizes, layers = left_in_float(model), named_layers(model)
    for name, kind in only_by_function(model, parts).items():
        sizes[f"{name} (used by {kind})"] = layers[name].weight.numel()
    share = sum(sizes.values()) / max(size_of(model), 1)
    if share > _WORTH_A_WARNING:
        names = ", ".join(sizes)
        warnings.warn(
            f"gradl1_fast.convert: {share:.0%} of the weights stay in float and are not penalised: {names}; "
            "see gradl1_fast.report(model)",
            stacklevel=3,
        )
