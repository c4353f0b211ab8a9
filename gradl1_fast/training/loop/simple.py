"""Training with the penalty in the last epochs, and the accuracy of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradl1_fast.conversion import convert
from gradl1_fast.training.config import Config, Optimizer, Penalty, Training
from gradl1_fast.training.data import Batch
from gradl1_fast.training.loop.trainer import Trainer

__all__ = ["Recipe", "accuracy", "train"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam with a cosine schedule, on cross-entropy plus the penalty.

    Attributes:
        epochs: passes over the training images.
        penalty_epochs: number of final epochs with the penalty; 0 trains plainly.
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

    def config(self, seed: int) -> Config:
        """Return the recipe as the trainer takes it; data and network are its caller's."""
        coefficients = dict.fromkeys(("lambda_w", "lambda_a"), self.coefficient)
        return Config(
            optimizer=Optimizer("adam", self.learning_rate),
            training=Training(self.epochs, self.batch_size, seed=seed),
            penalty=Penalty("gradl1", self.penalty_epochs, settings={**coefficients, "scale": self.scale}),
        )


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
    trainer = Trainer(convert(model), data, recipe.config(seed))
    while not trainer.done:
        trainer.run_epoch()
        if on_epoch is not None:
            on_epoch(trainer.epoch + 1, float(torch.stack(trainer.seen.losses).mean()))
        trainer.next_epoch()
    return trainer.model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch, batch_size: int = 200) -> float:
    """Return the percentage of images that the model, in its present mode and width, gets right.

    Images and labels are moved to the device of the model's first parameter, batch by batch.
    """
    images, labels = data
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right: list[Tensor] = [
        (model(x.to(device)).argmax(1) == y.to(device)).sum()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return 100 * float(torch.stack(right).sum()) / len(labels)
