"""What no exact double backprop of this algebra can undercut, as work that is done and timed in the same run.

Three floors, each for the whole step: the arithmetic of the convolutions, the bytes that must move, and
the calls that must be made. Each is a lower bound by itself; a step pays for all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.workloads import Task

__all__ = ["FLOORS", "Arithmetic", "Bytes", "Calls", "Floor", "Layer", "layers"]

# Passes over a tensor in the four sweeps of batch norm with its activation: 3 forward, 5 backward, 8 double
# backward, and 5 more when the second-order gradient goes through the forward graph. Pooling and the like
# read and write once in each of the four.
_NORM_PASSES, _OTHER_PASSES, _SWEEPS = 21, 4, 4
_FIXED_CALLS = 3 + 4  # l1 norm of the weights there and back, the optimiser; the loss in four sweeps


@dataclass(frozen=True)
class Layer:
    """A leaf module as it was called.

    Attributes:
        module: itself.
        x: its input.
        y: its output.
        is_first: whether its input is data, so that nobody asks for its gradient.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    is_first: bool

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or linear layer."""
        return isinstance(self.module, nn.Conv2d | nn.Linear)

    @property
    def products(self) -> int:
        """Convolutions (fprop, dgrad, wgrad) that exact double backprop takes."""
        return 4 if self.is_first else 9

    def passes(self) -> list[tuple[Tensor, int]]:
        """Return tensors, and how often each is read or written at least."""
        if self.multiplies:
            assert isinstance(self.module.weight, Tensor)
            return [(t, self.products) for t in (self.x, self.y, self.module.weight.detach())]
        if isinstance(self.module, nn.BatchNorm2d):
            return [(self.x, _NORM_PASSES)]
        moves = isinstance(self.module, nn.MaxPool2d | nn.AdaptiveAvgPool2d)
        return [(self.x, _OTHER_PASSES), (self.y, _OTHER_PASSES)] if moves else []

    def calls(self) -> int:
        """Return how many operators must be called at least; an activation costs nothing of its own."""
        counted = isinstance(self.module, nn.BatchNorm2d | nn.MaxPool2d | nn.AdaptiveAvgPool2d)
        return self.products if self.multiplies else _SWEEPS if counted else 0


def layers(task: Task) -> list[Layer]:
    """Return the leaf modules of a network in the order in which a batch meets them."""
    model, found = task.network(), []

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        found.append(Layer(module, args[0].detach(), y.detach(), args[0] is task.x))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(task.x)
    return found


class Floor(Protocol):
    """Work that can be timed like a step."""

    steps: int

    def __call__(self) -> None:
        """Do it."""

    def counts(self) -> dict[str, int]:
        """Return what is known of it without a measurement."""


class Arithmetic:
    """Three times the convolutions and matrix products of the plain step, and nothing else."""

    steps = 1

    def __init__(self, task: Task) -> None:
        self.layers = [layer for layer in layers(task) if layer.multiplies]

    def __call__(self) -> None:
        """Compute them on the tensors of a forward pass."""
        for layer in self.layers:
            for _ in range(3):
                _multiply(layer)

    def counts(self) -> dict[str, int]:
        """Return the number of products."""
        return {"operator_calls": 3 * sum(2 if layer.is_first else 3 for layer in self.layers)}


class Bytes:
    """Copies that move as many bytes as a step must, tensor by tensor."""

    steps = 1

    def __init__(self, task: Task) -> None:
        self.passes = [(t, n) for layer in layers(task) for t, n in layer.passes()]
        self.targets = {t.shape: torch.empty_like(t) for t, _ in self.passes}

    def __call__(self) -> None:
        """Copy; each copy is two passes."""
        for t, passes in self.passes:
            for _ in range((passes + 1) // 2):
                self.targets[t.shape].copy_(t)

    def counts(self) -> dict[str, int]:
        """Return the bytes."""
        return {"bytes_moved": sum(passes * t.numel() * t.element_size() for t, passes in self.passes)}


class Calls:
    """As many calls of the smallest operator as a step must make."""

    steps = 1

    def __init__(self, task: Task) -> None:
        self.count = _FIXED_CALLS + sum(layer.calls() for layer in layers(task))
        self.t = torch.zeros(1, device=task.x.device)

    def __call__(self) -> None:
        """Call it."""
        for _ in range(self.count):
            self.t.neg_()

    def counts(self) -> dict[str, int]:
        """Return the number of calls."""
        return {"operator_calls": self.count}


FLOORS: dict[str, Callable[[Task], Floor]] = {
    "floor: 3 × plain convolutions": Arithmetic,
    "floor: minimal bytes": Bytes,
    "floor: operator calls": Calls,
}


def _multiply(layer: Layer) -> None:
    """Compute forward, gradient of the input unless it is data, and gradient of the weight."""
    module, x, y = layer.module, layer.x, layer.y
    if isinstance(module, nn.Linear):
        _ = x @ module.weight.detach().T, y.T @ x, y @ module.weight.detach()
        return
    assert isinstance(module, nn.Conv2d)
    weight = module.weight.detach()
    geometry: Any = (module.stride, module.padding, module.dilation)
    torch.ops.aten.convolution(x, weight, None, *geometry, False, [0, 0], module.groups)
    mask = [not layer.is_first, True, False]
    torch.ops.aten.convolution_backward(y, x, weight, None, *geometry, False, [0, 0], module.groups, mask)
