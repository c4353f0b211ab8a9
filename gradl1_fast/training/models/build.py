"""Networks by name, as the command and a run's configuration call them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast._extras import install
from gradl1_fast.training.models.mobilenet import digits_net, mobilenet_like, mobilenet_v2
from gradl1_fast.training.models.resnet import resnet18, resnet20, resnet50
from gradl1_fast.training.models.vgg import vgg_like, vgg_small

__all__ = ["NAMES", "build"]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "digits_net": digits_net,
    "vgg_like": vgg_like,
    "vgg_small": vgg_small,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "mobilenet_like": mobilenet_like,
    "mobilenet_v2": mobilenet_v2,
}
NAMES = tuple(_BUILDERS)
_TIMM = "timm:"


def build(
    name: str, *, classes: int = 10, channels: int = 3, width: int | None = None, stem: str | None = None
) -> nn.Module:
    """Return a network with random weights, drawn from torch's default generator.

    Args:
        name: one of ``NAMES``, or ``timm:NAME`` for a model of the package timm.
        classes: number of outputs.
        channels: of the images.
        width: channels of the first layer or stage; None for the network's own.
        stem: ``"cifar"`` or ``"imagenet"``, for the networks that have both; None for the network's own.

    Raises:
        ValueError: there is no such network, or it has no such choice of width or stem.
        TypeError: a number has the wrong type.
        ImportError: timm is asked for and not installed, or cannot be imported.
    """
    check.count("classes", classes)
    check.count("channels", channels)
    if width is not None:
        check.count("width", width)
    settings = {key: value for key, value in (("width", width), ("stem", stem)) if value is not None}
    if name.startswith(_TIMM):
        return _from_timm(name.removeprefix(_TIMM), classes, channels, settings)
    if name not in _BUILDERS:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, or timm:NAME, got {name!r}")
    builder = _BUILDERS[name]
    for key in settings.keys() - inspect.signature(builder).parameters.keys():
        raise ValueError(f"{key}: the model {name} does not take it, got {settings[key]!r}")
    return builder(classes=classes, channels=channels, **settings)


def _from_timm(name: str, classes: int, channels: int, settings: dict[str, Any]) -> nn.Module:
    for key, value in settings.items():
        raise ValueError(f"{key}: a model of timm does not take it, got {value!r}")
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the model timm:{name} needs timm: {install('timm')}") from error
    except RuntimeError as error:  # its torchvision, where the compiled half is of another build than torch
        raise ImportError(
            f"the model timm:{name} needs timm, which cannot be imported here: {error}; "
            "torch and torchvision must be from the same build"
        ) from error
    if name not in timm.list_models():
        raise ValueError(f"timm has no model {name!r}; see timm.list_models()")
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
