"""The step in JAX, jitted whole: forward, penalty, backward, SGD. Needs the extra ``jax``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from bench import sites
from bench.jax_network import from_torch, network, to_torch
from bench.steps import LEARNING_RATE, MOMENTUM
from bench.workloads import Task

__all__ = ["JaxStep"]

Loss = Callable[[Any, Any], Any]


class JaxStep:
    """A training step of the same network, from the same weights, on the same images.

    Args:
        task: what it runs on.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term.
        way: ``"plain"``, ``"grad of grad"`` or ``"jvp of grad"``.
    """

    steps = 1
    shows_operators = False

    def __init__(self, task: Task, lambda_w: float, lambda_a: float, way: str) -> None:
        model = task.network()
        self.parameters = {name: from_torch(name, p) for name, p in model.named_parameters()}
        self.velocity = jax.tree.map(jnp.zeros_like, self.parameters)
        self.batch = from_nchw(task.x), jnp.asarray(task.y.cpu().numpy())
        logits = network(model)
        zeros = [jnp.zeros(_nhwc(shape)) for shape in sites.shapes(model, task.x)]

        def loss(batch: Any, parameters: Any, places: Any) -> Any:
            out = jax.nn.log_softmax(logits(parameters, batch[0], places))
            return -jnp.take_along_axis(out, batch[1][:, None], 1).mean()

        def gradient(batch: Any, parameters: Any) -> Any:
            return WAYS[way](partial(loss, batch), zeros, lambda_w, lambda_a)(parameters)

        def step(batch: Any, parameters: Any, velocity: Any) -> Any:
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient(batch, parameters))
            return jax.tree.map(lambda p, v: p - LEARNING_RATE * v, parameters, velocity), velocity

        jitted = jax.jit(step, donate_argnums=(1, 2))
        self._step = jitted.lower(self.batch, self.parameters, self.velocity).compile()

    def __call__(self) -> None:
        """Take the step, to its end."""
        self.parameters, self.velocity = jax.block_until_ready(
            self._step(self.batch, self.parameters, self.velocity)
        )

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient: what a step leaves in a velocity that was zero."""
        arguments = jax.tree.map(jnp.copy, self.parameters), jax.tree.map(jnp.zeros_like, self.velocity)
        _, found = self._step(self.batch, *arguments)  # it updates them in place
        return {name: to_torch(name, g) for name, g in found.items()}

    def peak_bytes(self) -> int:
        """Return what XLA reserves for a step besides its arguments, which are updated in place."""
        memory: Any = self._step.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def from_nchw(x: Tensor) -> Any:
    """Return images in JAX's layout."""
    return jnp.asarray(x.cpu().permute(0, 2, 3, 1).contiguous().numpy())


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


def _plain(loss: Loss, zeros: Any, lambda_w: float, lambda_a: float) -> Callable[[Any], Any]:
    return lambda parameters: jax.grad(loss)(parameters, zeros)


def _grad_of_grad(loss: Loss, zeros: Any, lambda_w: float, lambda_a: float) -> Callable[[Any], Any]:
    def total(parameters: Any) -> Any:
        value, (of_weights, of_places) = jax.value_and_grad(loss, (0, 1))(parameters, zeros)
        weights = sum(jnp.abs(g).sum() for g in of_weights.values() if g.ndim > 1)
        places = sum(jnp.abs(g).sum() for g in of_places)
        return value + lambda_w * weights + lambda_a * places

    return jax.grad(total)


def _jvp_of_grad(loss: Loss, zeros: Any, lambda_w: float, lambda_a: float) -> Callable[[Any], Any]:
    def gradient(parameters: Any) -> Any:
        of_weights, of_places = jax.grad(loss, (0, 1))(parameters, zeros)
        direction = (
            {n: (lambda_w if g.ndim > 1 else 0.0) * jnp.sign(g) for n, g in of_weights.items()},
            [lambda_a * jnp.sign(g) for g in of_places],
        )
        value, tangent = jax.jvp(jax.grad(loss), (parameters, zeros), direction)
        return jax.tree.map(jnp.add, value, tangent)

    return gradient


WAYS = {"plain": _plain, "grad of grad": _grad_of_grad, "jvp of grad": _jvp_of_grad}
