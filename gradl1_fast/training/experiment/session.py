"""One training that branches: methods that part after some epochs share those before."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Dataset
from gradl1_fast.training.experiment.measurements import Norms, norms
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs import folder as runs

__all__ = ["Epoch", "Session"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training was.

    Attributes:
        epoch: its number, from 1.
        loss: mean over its steps.
        penalty: mean over its steps.
        seconds: it took, on the clock.
        cpu_seconds: of computing alone, over all cores; tells more on a busy computer.
    """

    epoch: int
    loss: float
    penalty: float
    seconds: float
    cpu_seconds: float


class Session:
    """A training, and what is measured in it.

    Args:
        config: of the whole training.
        data: to train with.
        probed: number of training images to measure norms with.
        marks: measurements of norms in an epoch.

    Attributes:
        trainer: the training.
        epochs: those that are done.
        norms: measured so far; not during the steps whose time is taken.
    """

    def __init__(self, config: Config, data: Dataset, probed: int, marks: int) -> None:
        self.data, self.marks = data, marks
        self.probed = data.train[0][:probed], data.train[1][:probed]
        torch.manual_seed(config.training.seed)
        model = runs.network(config, data.classes, data.channels)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trainer = Trainer(model, data.train, config)
        self.epochs: list[Epoch] = []
        self.norms: list[Norms] = []
        self._measuring = 0.0

    def branch(self, config: Config) -> Session:
        """Return a copy that goes on by itself, with another penalty: call it between two epochs."""
        other = Session(config, self.data, len(self.probed[1]), self.marks)
        if not self.epochs:  # the same seed has given it the same state
            return other
        other.trainer.model.load_state_dict(self.trainer.model.state_dict())
        other.trainer.load_state_dict(copy.deepcopy(self.trainer.state_dict()))
        other.epochs, other.norms = list(self.epochs), list(self.norms)
        return other

    def run_epoch(self) -> None:
        """Train for one epoch."""
        if self.epochs:
            self.trainer.next_epoch()
        else:
            self._measure(0.0)
        self._measuring, start = 0.0, time.process_time()
        self.trainer.run_epoch(self._after_step)
        cpu = time.process_time() - start - self._measuring
        seen = self.trainer.seen
        loss, penalty = (float(torch.stack(terms).mean()) for terms in (seen.losses, seen.penalties))
        self.epochs.append(Epoch(self.trainer.epoch + 1, loss, penalty, seen.seconds, cpu))

    def _after_step(self, trainer: Trainer) -> None:
        """Measure at evenly spaced steps, the last one of an epoch among them."""
        step, steps = trainer.step, trainer.steps
        if (step * self.marks) // steps != ((step - 1) * self.marks) // steps:
            start = time.process_time()
            self._measure(trainer.epoch + step / steps)
            self._measuring += time.process_time() - start

    def _measure(self, epoch: float) -> None:
        self.norms.append(norms(self.trainer.model, self.probed, epoch))
