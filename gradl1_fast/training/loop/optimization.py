"""Optimizers, the cosine schedule, and the moving average of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.state_dicts import load_entries
from gradl1_fast.training.config import Optimizer

__all__ = ["Average", "add_parameters", "optimizer_for", "schedule_for"]


def optimizer_for(
    model: nn.Module, settings: Optimizer, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Return an optimizer of the model's parameters.

    Args:
        model: any module.
        settings: which, and its numbers.
        capturable: keep its counters and its learning rate on the device, so that a CUDA graph can hold
            its step.
    """
    parameters, decay = list(model.parameters()), settings.weight_decay
    device = parameters[0].device
    rate: float | Tensor = settings.learning_rate
    if capturable:
        rate = torch.tensor(rate, device=device)
    if settings.name == "sgd":
        momentum = settings.momentum
        # of the forms of SGD the fused one alone reads the rate on the device
        return torch.optim.SGD(
            parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0, fused=capturable or None
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, rate, weight_decay=decay, capturable=capturable)


def schedule_for(
    optimizer: torch.optim.Optimizer, settings: Optimizer, epochs: int, steps: int
) -> lr_scheduler.LRScheduler:
    """Return the schedule, to be stepped after each step: up along a line, then down along a cosine to 0.

    Args:
        optimizer: whose learning rate is its highest.
        settings: the epochs of the rise.
        epochs: of the whole training.
        steps: in an epoch.
    """
    rise = settings.warmup_epochs * steps
    if not rise:
        return lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    up = lr_scheduler.LinearLR(optimizer, 1 / (rise + 1), 1, rise)
    down = lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps - rise)
    return lr_scheduler.SequentialLR(optimizer, [up, down], [rise])


def add_parameters(
    optimizer: torch.optim.Optimizer, schedule: lr_scheduler.LRScheduler, model: nn.Module
) -> None:
    """Optimize the parameters that were added to a model, without weight decay, at the scheduled rate.

    Args:
        optimizer: of the model's other parameters.
        schedule: of the optimizer; it sets the rate of the new ones as well.
        model: whose parameters are looked through.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in model.parameters() if id(p) not in known]
    if not new:
        return
    first = optimizer.param_groups[0]
    rates = {"lr": first["lr"], "initial_lr": first["initial_lr"]}
    optimizer.add_param_group({"params": new, "weight_decay": 0.0, **rates})
    for part in [schedule, *getattr(schedule, "_schedulers", [])]:
        for rates_of_groups in (getattr(part, "base_lrs", None), part._last_lr):
            if rates_of_groups is not None:  # a sequence of schedules has no base rates of its own
                rates_of_groups.append(rates_of_groups[0])


class Average:
    """The exponential moving average of a model's weights and statistics.

    In its first steps it moves faster, so that it forgets where the training began: after n updates
    the decay is at most ``(n + 1) / (n + 10)``. Whole numbers, such as counts of batches, are not averaged.

    Entries are paired by name. ``torch.optim.swa_utils.AveragedModel`` pairs parameters and buffers by
    position, and fails with methods that add some in the course of the training.

    Args:
        model: whose state dict is averaged.
        decay: share of the average that one update leaves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def follow(self, model: nn.Module) -> None:
        """Average the present entries of the model's state; new ones begin at their present value."""
        known = self.state
        self.state = {
            key: known[key] if key in known else value.detach().clone()
            for key, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the weights of one step enter.

        Raises:
            RuntimeError: the model is at a bit width, at which batch norms may have statistics of that width.
        """
        _require_float(model)
        decay = min(self.decay, (self.updates + 1) / (self.updates + 10))
        self.updates += 1
        new = model.state_dict()
        averaged = [key for key, value in new.items() if value.is_floating_point()]
        if averaged:
            update = get_ema_multi_avg_fn(decay)
            update([self.state[key] for key in averaged], [new[key] for key in averaged], self.updates)
        for key in new.keys() - set(averaged):
            self.state[key].copy_(new[key])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averages for the ``with`` block; then it gets back its very values."""
        before = {key: value.detach().clone() for key, value in model.state_dict().items()}
        load_entries(model, self.state)
        try:
            yield
        finally:
            load_entries(model, before)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a training that resumes must restore."""
        return {**self.state, "": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        self.updates = int(state[""])
        for key, value in self.state.items():
            value.copy_(state[key])


def _require_float(model: nn.Module) -> None:
    quantizers = (m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer))
    if any(quantizer.bits is not None for quantizer in quantizers):
        raise RuntimeError(
            "the average of weights cannot be updated while the model is at a bit width: "
            "call gradl1_fast.set_bits(model, w=None, a=None) first"
        )
