"""Detects hooks and replaced forward passes of modules."""

from __future__ import annotations

from torch import nn

__all__ = ["has_hooks", "has_own_forward"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of any kind."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the ``forward`` of this module was replaced on the instance."""
    return "forward" in vars(module)
