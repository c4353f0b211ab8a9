"""Training steps in PyTorch: forward, penalty, backward, SGD. Every provider of ``bench step`` makes one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from bench.workloads import Task

__all__ = ["LEARNING_RATE", "MOMENTUM", "ByClosure", "Captured", "Penalised", "Step", "TorchStep"]

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
Penalty = Callable[[Tensor], Tensor]


class Step(Protocol):
    """What is timed.

    Attributes:
        steps: optimisation steps in one call.
        shows_operators: whether PyTorch's dispatcher sees the operators, so that they can be counted.
    """

    steps: int
    shows_operators: bool

    def __call__(self) -> None:
        """Take the step, or the steps."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the mean gradient by parameter, at the parameters of now, taking no step."""


class TorchStep:
    """A step of a module whose gradients ``backward`` leaves in ``grad``.

    Args:
        model: the network, converted or not.
    """

    steps = 1
    shows_operators = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def __call__(self) -> None:
        """Take the steps."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Return the mean gradient of as many steps as one call takes."""
        self.optimizer.zero_grad()
        for _ in range(self.steps):
            self.backward()
        names_parameters = self.model.named_parameters()
        return {name: p.grad.detach() / self.steps for name, p in names_parameters if p.grad is not None}

    def backward(self) -> None:
        """Add the gradient of the whole objective to each parameter's ``grad``."""
        raise NotImplementedError


class Penalised(TorchStep):
    """``(loss + penalty(loss)).backward()``; without a penalty, the plain step.

    Args:
        task: what it runs on.
        model: the network, converted or not.
        penalty: added to the loss, or None.
        backend: computes the step; None for the automatic choice.
        steps: optimisation steps in one call.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        penalty: Penalty | None = None,
        *,
        backend: str | None = None,
        steps: int = 1,
    ) -> None:
        super().__init__(model)
        self.task, self.penalty, self.backend, self.steps = task, penalty, backend, steps

    def backward(self) -> None:
        """Differentiate loss and penalty."""
        with contextlib.nullcontext() if self.backend is None else gl.backend(self.backend):
            loss = self.task.loss(self.model)
            total = loss if self.penalty is None else loss + self.penalty(loss)
            total.backward()


class ByClosure(TorchStep):
    """A step whose penalty calls the forward pass by itself, as the finite difference does.

    Args:
        task: what it runs on.
        model: the converted network.
        penalty: with the method ``backward(closure)``.
    """

    def __init__(self, task: Task, model: nn.Module, penalty: gl.GradL1) -> None:
        super().__init__(model)
        self.task, self.penalty = task, penalty

    def backward(self) -> None:
        """Differentiate by the closure."""
        self.penalty.backward(lambda: self.task.loss(self.model))


class Captured:
    """Another step, recorded as a CUDA graph and replayed.

    Args:
        step: its ``model`` and ``backward`` are recorded together with its optimiser.
    """

    steps = 1
    shows_operators = False

    def __init__(self, step: TorchStep) -> None:
        self.step = step
        step.optimizer = torch.optim.SGD(
            step.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, foreach=True
        )
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Replay the step, after recording it the first time."""
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def gradients(self) -> dict[str, Tensor]:
        """Return what a recording of the backward pass alone leaves in ``grad`` after a replay."""
        self._warm_up(self.step.backward)
        graph = torch.cuda.CUDAGraph()
        self.step.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.step.backward()
        graph.replay()
        torch.cuda.synchronize()
        named = self.step.model.named_parameters()
        return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}

    def _record(self) -> torch.cuda.CUDAGraph:
        self._warm_up(self.step)
        graph = torch.cuda.CUDAGraph()
        self.step.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.step.backward()
            self.step.optimizer.step()
        return graph

    def _warm_up(self, run: Callable[[], object]) -> None:
        """Run on a side stream first, as recording asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
