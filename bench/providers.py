"""The registry: every way to take a training step with the penalty, and the plain steps beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from bench import sites
from bench.steps import ByClosure, Captured, Penalised, Step
from bench.transforms import CompiledStep, JvpStep
from bench.workloads import Task
from gradl1_fast import backends
from gradl1_fast._extras import install

__all__ = ["LAMBDA", "PLAIN", "PROVIDERS", "SCALE", "STEP_BITS", "CannotRunError", "Provider"]

LAMBDA = 1e-3
SCALE = "none"  # the norms alone, which all peers penalise
STEP_BITS = 4
PLAIN, OURS = "plain", "gradl1_fast"
BACKENDS = ("reference", "host", "triton", "cuda")


class CannotRunError(RuntimeError):
    """A provider has no place here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A way to take a step.

    Attributes:
        name: of its row.
        make: returns the step of a task with two coefficients and the backend of torch.compile; raises
            CannotRunError, ImportError or UnavailableError where it has no place.
        exact: whether its gradient must be that of double backprop; otherwise its error is a result.
        terms: ``(lambda_w, lambda_a)``.
        by_step: whether norms are multiplied by the steps of their tensors, the setting that is recommended.
        layout: of the network and images.
        amp: whether it runs under bf16 autocast.
        beside: the plain step of its own kind.
        compiles: whether getting ready takes long.
    """

    name: str
    make: Callable[[Task, float, float, str], Step]
    exact: bool = True
    terms: tuple[float, float] = (LAMBDA, LAMBDA)
    by_step: bool = False
    layout: str = "channels_last"
    amp: bool = False
    beside: str = PLAIN
    compiles: bool = False

    @property
    def objective(self) -> tuple[float, float, int | None]:
        """Both coefficients, and the width of the steps that multiply norms, or None."""
        return *self.terms, STEP_BITS if self.by_step else None

    def step(self, workload: Any, compiler: str) -> Step:
        """Return the step on a workload."""
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return self.make(workload.task(layout, self.amp), *self.terms, compiler)


def _plain(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    return Penalised(task, task.network())


def _eager(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    # Other revisions, whose steps are measured by these providers, have it elsewhere.
    from gradl1_fast.training.demo.speed import EagerPenalty

    model = task.network()
    return Penalised(task, model, EagerPenalty(model, lambda_w, lambda_a))


def _compiled(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    model = sites.collecting(task.network())
    if not (lambda_w or lambda_a):
        return CompiledStep(task, model, model, None, compiler)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    def penalty(loss: Tensor, activations: Sequence[Tensor]) -> Tensor:
        grads = torch.autograd.grad(loss, [*weights, *activations], create_graph=True)
        coefficients = [lambda_w] * len(weights) + [lambda_a] * len(activations)
        return torch.stack([c * g.abs().sum() for c, g in zip(coefficients, grads, strict=True)]).sum()

    return CompiledStep(task, model, model, penalty, compiler)


def _jvp(task: Task, lambda_w: float, lambda_a: float, compiler: str, *, compiled: bool = False) -> Step:
    return JvpStep(task, lambda_w, lambda_a, compiler if compiled else None)


def _jax(task: Task, lambda_w: float, lambda_a: float, compiler: str, *, way: str) -> Step:
    try:
        import jax
    except ImportError as error:
        raise ImportError(f"needs JAX: {install('jax')}") from error
    if task.x.device.type == "cuda" and jax.default_backend() == "cpu":
        raise CannotRunError("this JAX computes on the CPU alone")
    from bench.jax_step import JaxStep

    return JaxStep(task, lambda_w, lambda_a, way)


def _ours(
    task: Task,
    lambda_w: float,
    lambda_a: float,
    compiler: str,
    *,
    backend: str | None = None,
    every: int = 1,
    scale: str = SCALE,
) -> Step:
    if backend is not None:
        with gl.backend(backend):
            for op in backends.OPERATIONS:
                backends.resolve(op, task.x)
    model = gl.convert(task.network())
    penalty = gl.GradL1(model, lambda_w, lambda_a, scale, every, step_bits=STEP_BITS)
    return Penalised(task, model, penalty, backend=backend, steps=every)


def _ours_without(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    return Penalised(task, gl.convert(task.network()))


def _ours_compiled(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    model = gl.convert(task.network())
    penalty = gl.GradL1(model, lambda_w, lambda_a, SCALE)
    return CompiledStep(task, model, lambda x: (model(x), ()), lambda loss, _: penalty(loss), compiler)


def _ours_captured(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    if task.x.device.type != "cuda":
        raise CannotRunError(f"a CUDA graph needs a CUDA device, and this run is on {task.x.device.type}")
    model = gl.convert(task.network())
    return Captured(Penalised(task, model, gl.GradL1(model, lambda_w, lambda_a, SCALE)))


def _finite_difference(task: Task, lambda_w: float, lambda_a: float, compiler: str) -> Step:
    model = gl.convert(task.network())
    penalty = gl.GradL1(model, lambda_w, lambda_a, SCALE, method="finite_difference")
    return ByClosure(task, model, penalty)


_NOTHING, _WEIGHTS = (0.0, 0.0), (LAMBDA, 0.0)
_BF16: Any = {"exact": False, "amp": True}
_JAX: Any = {"layout": "NHWC", "beside": "plain, JAX", "compiles": True}
_INDUCTOR: Any = {"beside": "plain, torch.compile", "compiles": True}
_ALL = [
    Provider(PLAIN, _plain, terms=_NOTHING),
    Provider("plain, NCHW", _plain, terms=_NOTHING, layout="NCHW", beside="plain, NCHW"),
    Provider("plain, torch.compile", _compiled, terms=_NOTHING, **_INDUCTOR),
    Provider("plain, bf16 autocast", _plain, terms=_NOTHING, beside="plain, bf16 autocast", **_BF16),
    Provider("plain, JAX", partial(_jax, way="plain"), terms=_NOTHING, **_JAX),
    Provider("eager double backprop, NCHW", _eager, layout="NCHW", beside="plain, NCHW"),
    Provider("eager double backprop", _eager),
    Provider("eager double backprop, weights only", _eager, terms=_WEIGHTS),
    Provider("eager double backprop, bf16 autocast", _eager, beside="plain, bf16 autocast", **_BF16),
    Provider("double backprop, torch.compile", _compiled, **_INDUCTOR),
    Provider("torch.func, jvp of grad", _jvp),
    Provider("torch.func, jvp of grad, torch.compile", partial(_jvp, compiled=True), **_INDUCTOR),
    Provider("JAX, grad of grad", partial(_jax, way="grad of grad"), **_JAX),
    Provider("JAX, jvp of grad", partial(_jax, way="jvp of grad"), **_JAX),
    Provider("finite difference", _finite_difference, exact=False),
    Provider(OURS, _ours),
    Provider(f'{OURS}, scale="step"', partial(_ours, scale="step"), by_step=True),
    Provider(f"{OURS}, no penalty", _ours_without, terms=_NOTHING),
    Provider(f"{OURS}, weights only", _ours, terms=_WEIGHTS),
    *(Provider(f"{OURS}, {name}", partial(_ours, backend=name)) for name in BACKENDS),
    Provider(f"{OURS}, every=4", partial(_ours, every=4)),
    Provider(f"{OURS}, bf16 autocast", _ours, beside="plain, bf16 autocast", **_BF16),
    Provider(f"{OURS}, torch.compile", _ours_compiled, **_INDUCTOR),
    Provider(f"{OURS}, CUDA graph", _ours_captured),
]
PROVIDERS = {provider.name: provider for provider in _ALL}
