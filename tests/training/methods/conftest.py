"""The shared training run: each method trains once, and every test looks at the result."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from gradl1_fast.training.loop.trainer import Trainer
from tests.training.methods import small


@dataclass(frozen=True)
class Trained:
    """A finished small training.

    Attributes:
        trainer: after the last step, its method not closed.
        state: of the model, with what the method added.
        own: logits with the method's own quantizer, by width.
    """

    trainer: Trainer
    state: dict[str, Tensor]
    own: dict[tuple[int | None, int | None], Tensor]
    latent: nn.Module | None = None


@cache
def train(name: str) -> Trained:
    trainer = small.advance(small.trainer(name), small.STEPS)
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    own = {}
    for w, a in trainer.objective.widths:
        with trainer.to_be_kept() as model, trainer.objective.quantized(w, a), torch.no_grad():
            own[w, a] = model(small.IMAGES[0])
    return Trained(trainer, copy.deepcopy(state), own)


@pytest.fixture(scope="session")
def trained():
    """Return a function from the name of a method in an experiment to its small training."""
    return train
