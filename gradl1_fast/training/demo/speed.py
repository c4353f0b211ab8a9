"""The time of a training step: plain, with ordinary double backprop, and with this library."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast.conversion import convert
from gradl1_fast.penalty import GradL1
from gradl1_fast.training.data import Batch

__all__ = ["EagerPenalty", "Speed", "measure"]

PLAIN, EAGER = "plain step", "eager double backprop"
OURS, OURS_STEP = "gradl1_fast", 'gradl1_fast, scale="step"'

Step = Callable[[], object]


@dataclass(frozen=True)
class Speed:
    """Times of the steps of one network, in milliseconds.

    Attributes:
        network: which network, on which batch.
        times: of each round, by kind of step.
        disagreement: of the penalty by this library and by ordinary autograd, relative.
    """

    network: str
    times: dict[str, list[float]]
    disagreement: float

    def median(self, kind: str) -> float:
        """Return the median time of a kind of step."""
        return statistics.median(self.times[kind])

    def ratio(self, kind: str) -> float:
        """Return how many times as long as the plain step a kind of step takes."""
        return self.median(kind) / self.median(PLAIN)


class EagerPenalty:
    """The penalty of :class:`gradl1_fast.GradL1` by PyTorch's own means, on an unconverted model.

    Forward hooks give the convolutions and linear layers views of their inputs, one for each tensor; the
    gradients of these and of the weights come from ``torch.autograd.grad(create_graph=True)``.

    Args:
        model: a float model.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term; 0 takes no gradients of activations.
    """

    def __init__(self, model: nn.Module, lambda_w: float, lambda_a: float) -> None:
        self.lambda_w, self.lambda_a = lambda_w, lambda_a
        self.layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self._collect)

    def _collect(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Replace what a layer is given by a view that is not read by what goes past the layers."""
        x = args[0]
        if not self.lambda_a or not x.requires_grad:  # the network's input is data
            return None
        key = id(x), x._version  # of a tensor that is kept, so that no other gets its identity
        if key not in self.inputs:
            self.inputs[key] = x, x.view_as(x)
        return (self.inputs[key][1], *args[1:])

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the penalty of a loss computed since the last call."""
        weights = [layer.weight for layer in self.layers]
        activations = [own for _, own in self.inputs.values()]
        self.inputs = {}
        grads = torch.autograd.grad(loss, weights + activations, create_graph=True)
        coefficients = [self.lambda_w] * len(weights) + [self.lambda_a] * len(activations)
        terms = [c * grad.abs().sum() for c, grad in zip(coefficients, grads, strict=True)]
        return torch.stack(terms).sum()


def measure(
    network: str, make: Callable[[], nn.Module], batch: Batch, rounds: int, after_round: Step = lambda: None
) -> Speed:
    """Time the kinds of steps in turn, round by round, so that a slow moment meets all of them.

    Args:
        network: name for the result.
        make: returns the network; called once for each kind of step.
        batch: images and labels, the same in each step.
        rounds: number of timed steps of each kind, after two that are not timed.
        after_round: called after each round.
    """
    steps, penalties = _steps(make, batch)
    disagreement = abs(penalties[OURS]() / penalties[EAGER]() - 1)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(rounds + 2):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[kind].append(1000 * (time.perf_counter() - start))
        after_round()
    return Speed(network, times, disagreement)


def _steps(
    make: Callable[[], nn.Module], batch: Batch
) -> tuple[dict[str, Step], dict[str, Callable[[], float]]]:
    """Return by kind: a training step, and the value of the penalty."""
    coefficient = 1e-3
    models = {PLAIN: make(), EAGER: make(), OURS: convert(make()), OURS_STEP: convert(make())}
    penalties: dict[str, Callable[[Tensor], Tensor] | None] = {
        PLAIN: None,
        EAGER: EagerPenalty(models[EAGER], coefficient, coefficient),
        OURS: GradL1(models[OURS], coefficient, coefficient, scale="none"),
        OURS_STEP: GradL1(models[OURS_STEP], coefficient, coefficient, scale="step"),
    }
    for model in models.values():
        model.load_state_dict(models[PLAIN].state_dict())
    steps = {kind: _step(models[kind].train(), penalties[kind], batch) for kind in models}
    values = {kind: _value(models[kind], p, batch) for kind, p in penalties.items() if p is not None}
    return steps, values


def _step(model: nn.Module, penalty: Callable[[Tensor], Tensor] | None, batch: Batch) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = batch

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        total = loss if penalty is None else loss + penalty(loss)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def _value(model: nn.Module, penalty: Callable[[Tensor], Tensor], batch: Batch) -> Callable[[], float]:
    return lambda: float(penalty(F.cross_entropy(model(batch[0]), batch[1])).detach())
