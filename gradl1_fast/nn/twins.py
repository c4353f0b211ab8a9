"""Creates twins of modules: another class with the same parameters, buffers, hooks and mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from gradl1_fast.nn.references import redirect
from gradl1_fast.nn.stand_in import StandIn

M = TypeVar("M", bound=nn.Module)

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def retype(module: nn.Module, expected: type[nn.Module], cls: type[M], without: Sequence[str] = ()) -> M:
    """Return a shallow copy of ``module`` as a ``cls``, leaving out the named submodules.

    Raises:
        TypeError: ``module`` is not exactly of the expected class.
    """
    if type(module) is not expected:
        raise TypeError(
            f"{cls.__name__} stands in for {expected.__name__} exactly, got {type(module).__name__}: "
            "a subclass or a parametrized module may compute something else"
        )
    twin = shallow_copy(module)
    for name in without:
        twin._modules.pop(name, None)
        vars(twin).pop(name, None)
    twin.__class__ = cls
    return twin  # type: ignore[return-value]


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy that shares parameters, buffers, submodules and hooks in its own dictionaries."""
    twin = object.__new__(type(module))  # copy.copy fails for parametrized modules, which cannot be pickled
    twin.__dict__.update(vars(module))
    for name, value in vars(module).items():
        if name in _TABLES or name.endswith("_hooks"):
            twin.__dict__[name] = copy.copy(value)
    return twin


def copy_structure(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree that shares parameters and buffers.

    A module that occurs several times does so in the copy too. Methods, containers and closures among the
    attributes refer to the modules of the copy.
    """
    copies: dict[int, nn.Module] = {}
    copy = _copied(module, copies)
    redirect(copy, copies)
    return copy


def _copied(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in copies:
        copies[id(module)] = twin = shallow_copy(module)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _copied(child, copies)
        if isinstance(vars(twin).get("weight"), StandIn):
            vars(twin)["weight"] = StandIn.of(twin._modules["weight_quantizer"])
    return copies[id(module)]
