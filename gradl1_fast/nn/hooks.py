"""What is called around a module's passes, or in the place of its forward pass."""

from __future__ import annotations

from torch import nn

__all__ = ["has_hooks", "has_own_forward"]


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is called before or after the module's passes."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether somebody replaced the ``forward`` of this very module; its class says nothing then."""
    return "forward" in vars(module)
