"""Ways to take a training step with the penalty, each beside the plain step of the same network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.speed import EagerPenalty

__all__ = ["PROVIDERS", "Setting", "Step", "gradient_error", "make_step"]

Penalty = Callable[[Tensor], Tensor]
LAMBDA = 1e-3


@dataclass(frozen=True)
class Setting:
    """What a step is measured on.

    Attributes:
        make: returns the float network; equal at each call.
        x: images.
        y: labels.
        layout: memory format of network and images.
        autocast: type of autocast, or None.
    """

    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    layout: torch.memory_format = torch.channels_last
    autocast: torch.dtype | None = None

    def network(self) -> nn.Module:
        """Return the network on the device and in the layout of the images."""
        return self.make().to(self.x.device).to(memory_format=self.layout)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the batch."""
        context: Any = contextlib.nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.x.device.type, dtype=self.autocast)
        with context:
            return F.cross_entropy(model(self.x), self.y)


class Step:
    """One optimisation step of a model.

    Args:
        setting: what it runs on.
        model: the network, converted or not.
        penalty: added to the loss, or None.
        backend: computes the step; None for the automatic choice.
    """

    def __init__(
        self, setting: Setting, model: nn.Module, penalty: Penalty | None, backend: str | None = None
    ) -> None:
        self.setting, self.model, self.penalty, self.backend = setting, model, penalty, backend
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        with self.computed():
            self.total().backward()
        self.optimizer.step()

    def computed(self) -> contextlib.AbstractContextManager[None]:
        """Compute with the backend of this step."""
        return contextlib.nullcontext() if self.backend is None else gl.backend(self.backend)

    def total(self) -> Tensor:
        """Return loss plus penalty, with the graph."""
        loss = self.setting.loss(self.model)
        return loss if self.penalty is None else loss + self.penalty(loss)


def _plain(setting: Setting, lambda_w: float, lambda_a: float) -> Step:
    return Step(setting, setting.network(), None)


def _eager(setting: Setting, lambda_w: float, lambda_a: float) -> Step:
    model = setting.network()
    return Step(setting, model, EagerPenalty(model, lambda_w, lambda_a))


def _ours(setting: Setting, lambda_w: float, lambda_a: float, backend: str | None = None) -> Step:
    model = gl.convert(setting.network())
    return Step(setting, model, gl.GradL1(model, lambda_w, lambda_a), backend)


_reference = partial(_ours, backend="reference")


# Name of the row: how to make the step, and the two coefficients.
PROVIDERS: dict[str, tuple[Callable[[Setting, float, float], Step], float, float]] = {
    "plain": (_plain, 0.0, 0.0),
    "gradl1_fast, weights": (_ours, LAMBDA, 0.0),
    "gradl1_fast, weights and activations": (_ours, LAMBDA, LAMBDA),
    "gradl1_fast in pure PyTorch, weights": (_reference, LAMBDA, 0.0),
    "gradl1_fast in pure PyTorch, weights and activations": (_reference, LAMBDA, LAMBDA),
    "eager double backprop, weights": (_eager, LAMBDA, 0.0),
    "eager double backprop, weights and activations": (_eager, LAMBDA, LAMBDA),
}


def make_step(name: str, setting: Setting) -> Step:
    """Return the step of a provider."""
    make, lambda_w, lambda_a = PROVIDERS[name]
    return make(setting, lambda_w, lambda_a)


def gradient_error(name: str, setting: Setting) -> float:
    """Return how far a provider's whole gradient is from float64 double backprop, relative to its norm.

    On a few images: the error of a rule does not depend on the size of the batch.
    """
    _, lambda_w, lambda_a = PROVIDERS[name]
    few = Setting(setting.make, setting.x[:8], setting.y[:8], setting.layout, setting.autocast)
    step = make_step(name, few)
    exact_setting = Setting(lambda: setting.make().double(), few.x.double(), few.y, setting.layout)
    exact = _plain(exact_setting, 0, 0) if name == "plain" else _eager(exact_setting, lambda_w, lambda_a)
    gradient, truth = (_gradient(s) for s in (step, exact))
    return float((gradient - truth).norm() / truth.norm())


def _gradient(step: Step) -> Tensor:
    with step.computed():
        grads = torch.autograd.grad(step.total(), list(step.model.parameters()))
    return torch.cat([grad.double().flatten() for grad in grads])
