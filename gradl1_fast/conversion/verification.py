"""The comparison of a plan with the modules that it stands for, on the batch at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from gradl1_fast.conversion.unchanged import attributes_restored
from gradl1_fast.nn.second_pass import RandomState, buffers_kept

__all__ = ["difference"]

# Of the largest output: fused and plain operations round differently, more so in a deep network.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.2}


@torch.no_grad()
def difference(
    module: nn.Module, one: Callable[..., Any], other: Callable[..., Any], args: tuple[Any, ...]
) -> str:
    """Return how the outputs of two functions differ, nothing if they do not; the model stays as it is.

    Args:
        module: whose buffers and attributes the functions may change.
        one: a function of ``args``.
        other: another; if it raises, that is the difference.
        args: tensors, of which each function is given copies, for it may change them.
    """
    first, first_spec = _results(module, one, args)
    try:
        second, second_spec = _results(module, other, args)
    except Exception as error:  # the other is a guess at the one: it may raise anything
        return f"its plan raises {type(error).__name__}: {error}".splitlines()[0][:200]
    same = first_spec == second_spec and all(map(_is_same, first, second))
    return "" if same else "its outputs differ from those of its modules"


def _results(
    module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[list[Any], TreeSpec]:
    randomness = RandomState()
    try:
        with buffers_kept(module), attributes_restored(module):
            return tree_flatten(function(*(x.clone() for x in args)))
    finally:
        randomness.replay()


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return isinstance(one, Tensor) == isinstance(other, Tensor) and (one is other or bool(one == other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    scale = one[finite].abs().max() if bool(finite.any()) else one.new_zeros(())
    error = (one - other)[finite].abs().max() if bool(finite.any()) else one.new_zeros(())
    return bool(error <= _TOLERANCES[one.dtype] * scale)
