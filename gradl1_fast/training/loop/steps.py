"""How the gradients of one step are computed: eagerly, through torch.compile, or from a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Batch
from gradl1_fast.training.methods import METHODS, Method, Terms

__all__ = ["CompiledGradients", "EagerGradients", "Gradients", "check_supported", "mean_terms"]

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Gradients(Protocol):
    """Adds the gradient of an objective over the parts of a batch to each parameter's ``grad``."""

    def __call__(self, objective: Method, parts: Sequence[Batch], scaler: torch.amp.GradScaler) -> Terms:
        """Return the means over the parts."""
        ...


class EagerGradients:
    """The common way: the objective's own backward, part by part.

    Args:
        model: that computes the logits, wrapped for several ranks or recomputing or not.
        config: label smoothing and precision.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.smoothing = model, config.training.label_smoothing
        self.dtype = _TYPES.get(config.training.precision)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, with its graph, in float32 at least."""
        x, y = batch
        with self._autocast(x.device.type):
            logits = self.model(x)
        wide = logits if self.dtype is None else logits.float()
        return F.cross_entropy(wide, y, label_smoothing=self.smoothing)

    def __call__(self, objective: Method, parts: Sequence[Batch], scaler: torch.amp.GradScaler) -> Terms:
        """See :class:`Gradients`. Ranks exchange their gradients once, after the last part."""
        found = []

        def scale(loss: Tensor) -> Tensor:
            return scaler.scale(loss) / len(parts)

        for place, batch in enumerate(parts):
            with self._exchange(place + 1 == len(parts)):
                found.append(objective.backward(partial(self.loss, batch), scale))
        return mean_terms(found)

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(device, self.dtype)

    def _exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        if now or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


class CompiledGradients:
    """Loss, penalty and the gradient of their sum, compiled as one graph.

    Args:
        model: that computes the logits.
        config: label smoothing.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, config: Config, backend: str = "inductor") -> None:
        self.model, self.smoothing = model, config.training.label_smoothing
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.backend = backend
        self._compiled: tuple[Method, Callable[..., Any]] | None = None

    def __call__(self, objective: Method, parts: Sequence[Batch], scaler: torch.amp.GradScaler) -> Terms:
        """See :class:`Gradients`."""
        if self._compiled is None or self._compiled[0] is not objective:
            whole = torch.compile(self._function(objective), backend=self.backend, fullgraph=True)
            self._compiled = objective, whole
        found = [self._one(objective, batch, len(parts)) for batch in parts]
        return mean_terms(found)

    def _one(self, objective: Method, batch: Batch, count: int) -> Terms:
        assert self._compiled is not None
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            loss, penalty, grads = self._compiled[1](*batch)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad / count if parameter.grad is None else parameter.grad + grad / count
        return Terms(loss, penalty, dict(objective.parts))

    def _function(self, objective: Method) -> Callable[[Tensor, Tensor], Any]:
        def compute(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            loss = F.cross_entropy(self.model(x), y, label_smoothing=self.smoothing)
            extra = objective.added(loss)
            grads = torch.autograd.grad(loss + extra, self.parameters)
            return loss.detach(), extra.detach(), grads

        return compute


def mean_terms(found: Sequence[Terms]) -> Terms:
    """Return the means of what each part was trained on; of a norm, over the parts that measured it."""
    if len(found) == 1:
        return found[0]
    loss = torch.stack([terms.loss for terms in found]).mean()
    penalty = torch.stack([terms.penalty for terms in found]).mean()
    names = dict.fromkeys(name for terms in found for name in terms.parts)
    measured = {name: [terms.parts[name] for terms in found if name in terms.parts] for name in names}
    return Terms(loss, penalty, {name: torch.stack(values).mean() for name, values in measured.items()})


def check_supported(config: Config, objective: Method, ranks: int, device: torch.device) -> None:
    """Refuse what would compute a wrong number, or nothing at all, with the reason.

    Raises:
        ValueError: names the settings that do not go together.
    """
    training, method = config.training, objective.name
    if ranks > 1:
        _check_distributed(config, objective, ranks)
    for name in ("compile", "cuda_graph"):
        if getattr(training, name):
            _check_one_graph(name, config, objective, ranks)
    if training.compile and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise ValueError(
            f"compile: torch {torch.__version__} cannot trace torch.autograd.grad, and a compiled model "
            "alone has no second derivative; use a torch whose torch._dynamo.config has trace_autograd_ops"
        )
    if training.compile and training.cuda_graph:
        raise ValueError("choose compile or cuda_graph, not both")
    if training.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs an NVIDIA GPU; this run computes on {device}")
    if training.precision != "float32" and objective.needs_float32:
        raise ValueError(
            f"precision {training.precision} does not support the finite difference, whose small moves "
            "would be rounded away; use float32, or the setting method=exact"
        )
    if training.checkpointing and not _is_one_pass(objective):
        raise ValueError(
            f"checkpointing: with the method {method!r}, as configured, weights or ranges change before "
            f"activations are recomputed; it supports {_one_pass_methods()}"
        )


def _check_distributed(config: Config, objective: Method, ranks: int) -> None:
    if not _is_one_pass(objective):
        raise ValueError(
            f"{ranks} ranks: the method {objective.name!r}, as configured, takes several passes or keeps "
            f"separate ranges on each rank; distributed training supports {_one_pass_methods()}"
        )
    share = config.training.batch_size // config.training.accumulate
    if share % ranks:
        raise ValueError(f"{ranks} ranks must divide the {share} images of a part of a batch")


def _is_one_pass(objective: Method) -> bool:
    """Return whether a step is one forward and one backward pass, with nothing changed between the two.

    DistributedDataParallel averages gradients at the end of the backward pass; recomputed activations meet
    the same weights and ranges.
    """
    return objective.passes == 1 and objective.distributed


def _one_pass_methods() -> str:
    return (
        ", ".join(name for name, each in METHODS.items() if each.passes == 1 and each.distributed)
        + " (exact)"
    )


def _check_one_graph(name: str, config: Config, objective: Method, ranks: int) -> None:
    """Check what a step must be like to be traced or captured whole."""
    if not objective.compilable:
        allowed = " and ".join(repr(name) for name, each in METHODS.items() if each.compilable)
        raise ValueError(
            f"{name}: the whole step must be one graph, the same in every step; this holds for the methods "
            f"{allowed} (method='exact', every=1)"
        )
    if config.penalty.epochs and config.penalty.warmup_epochs:
        raise ValueError(
            f"{name}: a penalty warm-up changes the coefficient and would need a new graph in every step"
        )
    wrong = {
        "precision": config.training.precision != "float32",
        "checkpointing": config.training.checkpointing,
        "several ranks": ranks > 1,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(
                f"{name} does not go together with {what}: only float32 in one process is tested"
            )
