"""One small training for every method: the same network, data and schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Data, Model, Optimizer, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.experiment.methods import VARIANTS, method_of, settings_of
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.methods import Terms, make

IMAGES = tuple(part[:60] for part in digits(0).train)
RECIPE = {"lambda_w": 0.01, "lambda_a": 0.01, "scale": "step"}
COMPOSED = [
    "gradl1+kure",
    "gradl1+qat-4",
    "gradl1+defensive",
    "sam+kure+defensive",
    "symreg+satnl+asam",
    "gradl1+satnl",
    "sam+qat-4",
]
NAMES = [*VARIANTS, *COMPOSED]
STEPS = 6  # of the whole training: three in each of two epochs, of which the second has the method


def network() -> nn.Module:
    """Return a small converted network with batch norm and, last, a layer without."""
    torch.manual_seed(3)
    layers = [
        *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, 10)),
    ]
    return gl.convert(nn.Sequential(*layers))


def config(name: str, **training: object) -> Config:
    """Return the configuration of the small training by a method of an experiment."""
    penalty = Penalty(method_of(name), 1, 0, settings_of(name, RECIPE))
    whole = Training(**{"epochs": 2, "batch_size": 20, **training})  # type: ignore[arg-type]
    return Config(
        Data(), Model(), Optimizer("adamw", 0.01, weight_decay=1e-3, warmup_epochs=1), whole, penalty
    )


def trainer(name: str, **training: object) -> Trainer:
    """Return the small training before its first step."""
    return Trainer(network(), IMAGES, config(name, **training))


def advance(made: Trainer, steps: int) -> Trainer:
    """Take some steps, across the border between epochs."""
    for _ in range(steps):
        if made.step == made.steps:
            made.next_epoch()
        whole, made.steps = made.steps, made.step + 1
        made.run_epoch()
        made.steps = whole
    return made


def step(
    name: str, model: nn.Module, closure: Callable[[], Tensor], **settings: object
) -> tuple[Terms, dict[str, Tensor]]:
    """Make one backward pass of a method; return the terms and the gradients by parameter, and close it."""
    method = make(name, model, **settings)
    terms = method.backward(closure)
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    method.close()
    return terms, grads
