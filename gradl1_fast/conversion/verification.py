"""Compares the outputs of a plan with those of the modules that it replaces, on the current batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from gradl1_fast.conversion.unchanged import attributes_restored
from gradl1_fast.nn.second_pass import buffers_kept, random_state_kept

__all__ = ["difference"]

# Relative to the largest output: fused and plain operations round differently, and errors grow with depth.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.2}


@torch.no_grad()
def difference(
    module: nn.Module, expected: Callable[..., Any], candidate: Callable[..., Any], args: tuple[Any, ...]
) -> str:
    """Return how the outputs of two functions differ, or an empty string; the model is not changed.

    Args:
        module: the module whose buffers and attributes the functions may change.
        expected: a function of ``args``.
        candidate: another function of ``args``; an error that it raises counts as a difference.
        args: tensors; each function gets copies, since it may change them.
    """
    first, first_spec = _results(module, expected, args)
    try:
        second, second_spec = _results(module, candidate, args)
    except Exception as error:  # an unverified plan may raise anything
        return f"its plan raises {type(error).__name__}: {error}".splitlines()[0][:200]
    same = first_spec == second_spec and all(map(_is_same, first, second))
    return "" if same else "its outputs differ from those of its modules"


def _results(
    module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[list[Any], TreeSpec]:
    with random_state_kept(), buffers_kept(module), attributes_restored(module):
        return tree_flatten(function(*(x.clone() for x in args)))


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _is_close(a, b)
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if dataclasses.is_dataclass(a):
        pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
        (first, first_spec), (second, second_spec) = map(tree_flatten, zip(*pairs, strict=True))
        return first_spec == second_spec and all(map(_is_same, first, second))
    try:
        return a is b or bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # such as the truth of an array
        return False


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    scale = a[finite].abs().max() if bool(finite.any()) else a.new_zeros(())
    error = (a - b)[finite].abs().max() if bool(finite.any()) else a.new_zeros(())
    return bool(error <= _TOLERANCES[a.dtype] * scale)
