"""Training methods with a common interface: the gradient-l1 penalty and the methods it is compared with.

Every module of this package is imported, and every class with a ``name`` is registered as a method. To add a
method, add a file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradl1_fast.training.methods.composition import SEPARATOR, Composed
from gradl1_fast.training.methods.interface import (
    Closure,
    Family,
    Method,
    Scale,
    Terms,
    Variant,
    Width,
    identity,
    registered,
)

__all__ = [
    "METHODS",
    "Closure",
    "Composed",
    "Family",
    "Method",
    "Scale",
    "Terms",
    "Variant",
    "Width",
    "classes_of",
    "identity",
    "make",
]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

METHODS: dict[str, type[Method]] = registered()


def classes_of(name: str) -> list[type[Method]]:
    """Return the class of a method, or the classes of methods combined with ``+``.

    Raises:
        ValueError: there is no such method, or one is named twice.
    """
    names = name.split(SEPARATOR)
    for one in names:
        if one not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, or several with +, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"method {name}: each part can be named once")
    return [METHODS[one] for one in names]


def make(name: str, model: nn.Module, **settings: Any) -> Method:
    """Create a method by name for a converted model; call this before the first forward pass.

    Args:
        name: a key of :data:`METHODS`, or several keys joined with ``+``.
        model: a converted model.
        **settings: the settings of the class; for several methods, each setting is named ``method.setting``.

    Raises:
        ValueError: there is no such method, a setting is out of range, the methods cannot be combined, or a
            method does not apply to the model.
        TypeError: a setting is missing, unknown or of the wrong type.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> from gradl1_fast.training.methods import make
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> settings = {"gradl1.lambda_w": 0.1, "kure.coefficient": 1.0}
        >>> method = make("gradl1+kure", model, **settings)
        >>> terms = method.backward(lambda: model(torch.ones(3, 4)).square().mean())
        >>> method.close()
    """
    classes = classes_of(name)
    if len(classes) == 1:
        return _make(classes[0], model, settings)
    _check_prefixes(name, settings)
    parts: list[Method] = []
    try:
        for cls in classes:
            parts.append(_make(cls, model, settings_of(cls.name, settings)))
        return Composed(model, parts)
    except BaseException:
        for part in reversed(parts):
            part.close()
        raise


def settings_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one of several methods, without the prefix."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}


def _check_prefixes(name: str, settings: Mapping[str, Any]) -> None:
    names = name.split(SEPARATOR)
    unknown = [key for key in settings if key.partition(".")[0] not in names or "." not in key]
    if unknown:
        raise TypeError(
            f"method {name}: a setting has the name of its method before it, as {names[0]}.SETTING; "
            f"got {', '.join(unknown)}"
        )


def _make(cls: type[Method], model: nn.Module, settings: Mapping[str, Any]) -> Method:
    signature = inspect.signature(cls)
    known = [key for key in signature.parameters if key != "model"]
    try:
        signature.bind(model, **settings)
    except TypeError as error:
        raise TypeError(
            f"method {cls.name}: {error}; its settings are {', '.join(known) or 'none'}"
        ) from error
    return cls(model, **settings)
