"""A model of the zoo made ready: random numbers that hide nothing, statistics, and one fixed loss."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.zoo.entries import Batch, Entry, run

SEED = 1


def seed() -> None:
    """Start all random numbers anew: two runs of one model then drop the same."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(SEED)  # the generator that models themselves use


def make(entry: Entry, *, with_recipe: bool = False) -> tuple[nn.Module, Batch]:
    """Return the model in float64, in training mode, and its inputs."""
    seed()
    model = (_with_recipe(entry)[0] if with_recipe else entry.build()).double()
    batch = entry.batch()
    _stir(model)
    _settle(model, batch)
    return model.train(), batch


def recipe_of(entry: Entry) -> list[str]:
    """Return what the factory of the model has of a training recipe."""
    return _with_recipe(entry)[1]


def _with_recipe(entry: Entry) -> tuple[nn.Module, list[str]]:
    """Build with as much of the recipe as the factory takes: a name that it does not know is a TypeError."""
    names = list(entry.recipe)
    for chosen in (names, *([name] for name in reversed(names)), []):
        try:
            return entry.build(**{name: entry.recipe[name] for name in chosen}), chosen
        except TypeError:
            if not chosen:
                raise
    raise AssertionError("unreachable")


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Move scales and biases away from 0 and 1, where a branch that is lost would not be missed."""
    for p in model.parameters():
        if p.numel() == max(p.shape, default=1):
            p.add_(0.2 * torch.randn_like(p))
        elif p.numel() and (p == p.flatten()[0]).all():
            p.add_(0.02 * torch.randn_like(p))


@torch.no_grad()
def _settle(model: nn.Module, batch: Batch) -> None:
    """Give batch norms the statistics of the batch, as if it had been trained on."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    run(model.train(), batch)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def loss_of(outputs: Any) -> Tensor:
    """Return the mean squared distance of every output from numbers drawn for it."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(tensors(outputs)):
        target = torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        loss = loss + (t - target).square().mean()
    return loss


def tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in what a model returns."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        yield from tensors(list(outputs.values()))
    elif isinstance(outputs, list | tuple):
        for item in outputs:
            yield from tensors(item)
    elif dataclasses.is_dataclass(outputs) and not inspect.isclass(outputs):
        yield from tensors([getattr(outputs, f.name) for f in dataclasses.fields(outputs)])
