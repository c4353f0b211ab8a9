"""Training with the penalty in the last epochs, and the accuracy of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast.nn import convert
from gradl1_fast.penalty import GradL1
from gradl1_fast.training.data import Batch, shuffled_batches

__all__ = ["Recipe", "accuracy", "train"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam with a cosine schedule, on cross-entropy plus the penalty.

    Attributes:
        epochs: passes over the training images.
        penalty_epochs: the last so many epochs have the penalty; 0 trains plainly.
        coefficient: of the weights' and of the activations' term alike.
        scale: of :class:`gradl1_fast.GradL1`.
        learning_rate: at the start; the cosine brings it to 0 at the end.
        batch_size: images in a step.
    """

    epochs: int = 20
    penalty_epochs: int = 10
    coefficient: float = 0.1
    scale: str = "step"
    learning_rate: float = 1e-2
    batch_size: int = 50

    def without_penalty(self) -> Recipe:
        """Return the same recipe for the plain twin."""
        return replace(self, penalty_epochs=0)


def train(
    model: nn.Module,
    data: Batch,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Convert and train a model; return it in evaluation mode.

    One seed gives one order of the batches, whatever the penalty: twins of one initialisation that
    differ in ``penalty_epochs`` are equal up to the epoch in which one of them meets the penalty.

    Args:
        model: a float model.
        data: images and labels.
        recipe: see :class:`Recipe`.
        seed: of the order of the batches.
        on_epoch: called after each epoch with its number, from 1, and the mean loss without penalty.
    """
    model = convert(model).train()
    penalty = GradL1(model, recipe.coefficient, recipe.coefficient, scale=recipe.scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    steps = recipe.epochs * (len(data[0]) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, recipe.epochs + 1):
        penalised = epoch > recipe.epochs - recipe.penalty_epochs
        losses = []
        for x, y in shuffled_batches(data, recipe.batch_size, generator):
            loss = F.cross_entropy(model(x), y)
            total = loss + penalty(loss) if penalised else loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if on_epoch is not None:
            on_epoch(epoch, float(torch.stack(losses).mean()))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch, batch_size: int = 200) -> float:
    """Return the percentage of images that the model, in its present mode and width, gets right."""
    images, labels = data
    right: list[Tensor] = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return 100 * float(torch.stack(right).sum()) / len(labels)
