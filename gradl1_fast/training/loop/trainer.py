"""The training loop: the one there is. It knows no files; what it does is told to a listener."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Batch
from gradl1_fast.training.loop.batches import Batches
from gradl1_fast.training.loop.cuda_graph import GraphedStep
from gradl1_fast.training.loop.epoch import Epoch, TrainingError, check_finite
from gradl1_fast.training.loop.optimization import Average, add_parameters, optimizer_for, schedule_for
from gradl1_fast.training.loop.ranks import ALONE, Ranks
from gradl1_fast.training.loop.recompute import recomputing
from gradl1_fast.training.loop.steps import CompiledGradients, EagerGradients, Gradients, check_supported
from gradl1_fast.training.loop.values import on_device, values_kept
from gradl1_fast.training.methods import Method, Terms, make

__all__ = ["CHECK_EVERY", "Epoch", "Trainer", "TrainingError"]

CHECK_EVERY = 50  # steps between looks at the losses where a look waits


class Trainer:
    """Trains a converted model; can be stopped after any step and resumed, bit for bit on a CPU.

    One seed gives one order of the images and one augmentation, whatever the penalty and the number of
    ranks. The penalty of several ranks is the mean of the ranks' penalties, each on its own images.

    Args:
        model: a converted model, on the device of the ranks.
        data: training images and labels.
        config: everything else.
        ranks: the processes that train together.

    Raises:
        ValueError: settings that do not go together, or fewer images than one batch.
        TypeError: a setting of the penalty is of the wrong type.

    Attributes:
        model: the one that is trained.
        epoch: the present one, from 0; ``config.training.epochs`` at the end.
        step: the next one in this epoch, from 0.
        steps: in an epoch.
        seen: what the steps of this epoch were trained on.
    """

    def __init__(self, model: nn.Module, data: Batch, config: Config, ranks: Ranks = ALONE) -> None:
        settings = config.training
        self.model, self.data, self.config, self.ranks = model.train(), data, config, ranks
        self.steps = len(data[1]) // settings.batch_size
        if not self.steps:
            raise ValueError(
                f"batch_size: {settings.batch_size} is more than the {len(data[1])} training images"
            )
        self.epoch = self.step = 0
        self.seen = Epoch()
        self._check()
        self.optimizer = optimizer_for(model, config.optimizer, capturable=settings.cuda_graph)
        self.schedule = schedule_for(self.optimizer, config.optimizer, settings.epochs, self.steps)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "float16")
        self.average = Average(model, settings.ema) if settings.ema else None
        self._batches = Batches(data, config, ranks)
        self._graph: GraphedStep | None = None
        self.objective = self._new_objective()
        self.gradients = self._gradients()

    @property
    def penalised(self) -> bool:
        """Whether the present epoch has the penalty."""
        epochs = self.config.penalty.epochs
        return epochs > 0 and self.epoch >= self.config.training.epochs - epochs

    @property
    def steps_done(self) -> int:
        """Steps since the beginning of the training."""
        return self.epoch * self.steps + self.step

    @property
    def rate(self) -> float:
        """The present learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def done(self) -> bool:
        """Whether the training has come to its end."""
        return self.epoch >= self.config.training.epochs

    def run_epoch(self, after_step: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Take the steps that are left of this epoch; :meth:`next_epoch` begins the next one.

        Args:
            after_step: called after each step; ``state_dict`` may be asked for then.

        Raises:
            TrainingError: the loss or the penalty became NaN or infinite. This is detected at once on a CPU,
                otherwise within :data:`CHECK_EVERY` steps, because checking waits for the GPU and the ranks.
        """
        while self.step < self.steps:
            start = time.perf_counter()
            self.seen.add(self._take_step())
            self.step += 1
            if self.step % self._check_every == 0 or self.step == self.steps:
                self._check_losses()
            self.seen.seconds += time.perf_counter() - start
            after_step(self)

    def next_epoch(self) -> None:
        """Begin the next epoch; where the penalty begins with it, change the objective."""
        before = self.penalised
        self._batches.next_epoch()
        self.epoch, self.step, self.seen = self.epoch + 1, 0, Epoch()
        if self.penalised and not before and not self.done:
            self._replace_objective()

    def average_over_ranks(self) -> None:
        """Replace what this rank saw in the present epoch by the means over the ranks; call it on each."""
        if self.ranks.count > 1:
            for values in (self.seen.losses, self.seen.penalties):
                values[:] = self.ranks.mean(torch.stack(values)).unbind()
            for name, part in self.seen.parts.items():
                self.seen.parts[name] = self.ranks.mean(part)

    @contextlib.contextmanager
    def to_be_kept(self) -> Iterator[nn.Module]:
        """Yield the model as it would be kept now, in evaluation mode: with averaged weights, if any."""
        with contextlib.nullcontext() if self.average is None else self.average.applied(self.model):
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train()

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss of a batch in the model's present mode, in float32, with its graph."""
        return EagerGradients(self.model, self.config).loss(batch)

    def batch(self, step: int) -> Batch:
        """Return this rank's images and labels of a step of the present epoch, augmented, on its device."""
        return self._batches.batch(self.epoch, step)

    def _take_step(self) -> Terms:
        self.objective.strength = self._strength()
        x, y = self.batch(self.step)
        if self.config.training.cuda_graph:
            if self._graph is None:
                self._graph = GraphedStep(self.model, self.optimizer, self._change_weights, (x, y))
            terms = self._graph((x, y))
        else:
            terms = self._change_weights((x, y))
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        return terms

    def _change_weights(self, batch: Batch) -> Terms:
        count = self.config.training.accumulate
        parts = list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))
        self.optimizer.zero_grad()
        terms = self.gradients(self.objective, parts, self.scaler)
        self.scaler.step(self.optimizer)  # leaves the weights alone if a gradient is infinite or NaN
        self.scaler.update()
        self.objective.after_step()
        return terms

    def _strength(self) -> float:
        """Return the share of the penalty's coefficients at this step of their rise."""
        rise = self.config.penalty.warmup_epochs * self.steps
        begin = (self.config.training.epochs - self.config.penalty.epochs) * self.steps
        return min(1.0, (self.steps_done - begin + 1) / (rise + 1)) if self.penalised else 1.0

    def _replace_objective(self) -> None:
        self.objective.close()
        self.objective, self._graph = self._new_objective(), None

    def _new_objective(self) -> Method:
        """Return the method of the present epoch; what it adds to the model is optimized and averaged too."""
        penalty = self.config.penalty
        name, settings = (penalty.method, penalty.settings) if self.penalised else ("plain", {})
        method = make(name, self.model, **settings)
        add_parameters(self.optimizer, self.schedule, self.model)
        if self.average is not None:
            self.average.follow(self.model)
        return method

    def go_to(self, epoch: int) -> None:
        """Take the method of an epoch, counted from 0; call it before the state of a model is loaded.

        The model then has the parametrizations of that method.
        """
        before = self.penalised
        self.epoch = epoch
        if self.penalised != before:
            self._replace_objective()

    def finish(self) -> nn.Module:
        """Close the method and return the trained model in evaluation mode, with averaged weights, if any."""
        if self.average is not None:
            self.model.load_state_dict(self.average.state)
        self.objective.close()
        return self.model.eval()

    def _check(self) -> None:
        """Refuse a penalty that cannot be made before the first step, rather than when its turn comes."""
        method = self.config.penalty.method if self.config.penalty.epochs else "plain"
        settings = self.config.penalty.settings if self.config.penalty.epochs else {}
        with values_kept(self.model):
            trial = make(method, self.model, **settings)
            try:
                check_supported(self.config, trial, self.ranks.count, self.ranks.device)
            finally:
                trial.close()

    @property
    def _skips(self) -> bool:
        """Whether a step whose gradients are not finite changes nothing, as with float16."""
        return self.scaler.is_enabled()

    @property
    def _check_every(self) -> int:
        at_once = self.ranks.count == 1 and self.ranks.device.type == "cpu" and not self._skips
        return 1 if at_once else CHECK_EVERY

    def _check_losses(self) -> None:
        """Look at the latest steps, on every rank alike; waits for the device."""
        first = max(0, self.step - self._check_every)
        if first < self.step:
            losses, penalties = self.ranks.mean(self.seen.since(first)).cpu()
            if self._skips and len(losses) < CHECK_EVERY:  # the scale may be on its way down to what fits
                penalties = torch.zeros_like(penalties)
            check_finite(losses, penalties, self.epoch, first, skips=self._skips)

    def _gradients(self) -> Gradients:
        settings = self.config.training
        if settings.compile:
            return CompiledGradients(self.model, self.config)
        network = recomputing(self.model) if settings.checkpointing else self.model
        return EagerGradients(self.ranks.wrap(network), self.config)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model's own state that a training that resumes needs.

        It holds tensors, numbers, strings, lists and dictionaries alone. Call it on every rank.

        Raises:
            TrainingError: as :meth:`run_epoch`: a NaN state must not be resumed from.
        """
        if not self._skips:
            self._check_losses()
        device = self.ranks.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "order": self._batches.state,
            "random": self.ranks.gather(random),
            "objective": {"name": self.objective.name, "state": dict(self.objective.state_dict())},
            "seen": self.ranks.gather(self.seen.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`.

        Where the method changes the entries of the model's state, :meth:`go_to` comes first. The model's own
        state is loaded before this call. Tensors are moved to the device of the ranks.

        Raises:
            ValueError: it was written by another number of ranks, or with another objective.
        """
        if len(state["random"]) != self.ranks.count:
            raise ValueError(
                f"the checkpoint was written by {len(state['random'])} ranks, not {self.ranks.count}"
            )
        self.go_to(state["epoch"])
        self.step = state["step"]
        if state["objective"]["name"] != self.objective.name:
            raise ValueError(f"the checkpoint belongs to the objective {state['objective']['name']!r}")
        device = self.ranks.device
        self.objective.load_state_dict(on_device(device, state["objective"]["state"]))
        groups = on_device(
            device, state["optimizer"]["param_groups"]
        )  # a CUDA graph reads the rate on the device
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.schedule.load_state_dict(on_device(device, state["schedule"]))
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._batches.load_state(state["order"])
        self.seen = Epoch.from_state(on_device(device, state["seen"][self.ranks.rank]))
        mine = state["random"][self.ranks.rank]
        torch.set_rng_state(mine["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], device)
