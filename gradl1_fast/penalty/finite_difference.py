"""The penalty's gradient by a finite difference: two ordinary steps instead of double backprop.

The gradient of ``c * ||g||_1`` is ``c * H sign(g)``, the change of the gradient along ``sign(g)``.
It is measured by moving weights and activations a little along their signs and taking gradients
again. With ``scale="step"`` each direction is multiplied by its step, and the part of the gradient
that flows through the step, ``||g||_1 * d step``, is differentiated along with the second loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._checks import autocast_is_on
from gradl1_fast.penalty.checks.graph import require_gradients
from gradl1_fast.penalty.second_pass import RandomState, buffers_kept, shifted

__all__ = ["Measured", "add_gradients", "autocast_refused"]

StepOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """A tensor whose gradient is penalised: a weight, or the output of a module.

    Attributes:
        name: key of its term.
        source: the weight, or the module.
        coefficient: its lambda.
        step_of: gives the differentiable step of a tensor; None where the norm is taken as it is.
    """

    name: str
    source: Tensor | nn.Module
    coefficient: float
    step_of: StepOf | None


@dataclass
class _Move:
    """One penalised tensor of the first pass: its gradient, and the direction in which it moves."""

    measured: Measured
    grad: Tensor
    direction: Tensor

    def term(self, tensor: Tensor) -> Tensor:
        """Return ``sum step * |g|`` for the step of ``tensor``, with the gradient g held constant."""
        step_of = self.measured.step_of
        return (self.grad.abs() if step_of is None else step_of(tensor) * self.grad.abs()).sum()


def add_gradients(
    model: nn.Module,
    measured: Sequence[Measured],
    closure: Callable[[], Tensor],
    epsilon: float,
    factor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add to each parameter's ``grad`` that of the loss plus ``factor`` times the penalty.

    Args:
        model: owner of parameters and buffers.
        measured: what is penalised.
        closure: computes the loss; called twice.
        epsilon: the largest move, in units of weights and activations.
        factor: multiplies the penalty.

    Returns:
        The loss and the terms by name, detached.

    Raises:
        RuntimeError: something measured got no gradient, the second call used other parameters, or
            activations are computed again in the backward pass.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    randomness = RandomState()
    loss, grads, moves, terms = _first_pass(params, measured, closure)
    size = torch.stack([move.direction.abs().amax() for move in moves]).amax()
    unit = epsilon / size.clamp(min=torch.finfo(size.dtype).tiny)
    randomness.replay()
    with buffers_kept(model), _moved(moves, unit) as through_steps:
        second_loss = closure()
        for term in through_steps:
            second_loss = second_loss + unit * term
        second = torch.autograd.grad(second_loss, params, allow_unused=True)
    if any((g is None) != (moved is None) for g, moved in zip(grads, second, strict=True)):
        raise RuntimeError(
            "GradL1: the closure used other parameters at its second call; what it draws at random must "
            "come from torch's default generators"
        )
    for p, g, moved in zip(params, grads, second, strict=True):
        if g is not None and moved is not None:
            change = g + (factor / unit).to(g.dtype) * (moved - g)
            p.grad = change if p.grad is None else p.grad + change
    return loss.detach(), terms


def _first_pass(
    params: list[nn.Parameter], measured: Sequence[Measured], closure: Callable[[], Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...], list[_Move], dict[str, Tensor]]:
    targets = [(item, item.source) for item in measured if isinstance(item.source, Tensor)]

    def record(item: Measured, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:  # behind frozen layers alone
            output = output.detach().requires_grad_()
        targets.append((item, output))
        return output

    with _hooks(measured, record):
        loss = closure()
    unseen = [item.name for item in measured if all(item is not seen for seen, _ in targets)]
    require_gradients(unseen, [None] * len(unseen))
    grads = torch.autograd.grad(loss, [*params, *(t for _, t in targets)], allow_unused=True)
    found = require_gradients([item.name for item, _ in targets], grads[len(params) :])
    moves = [_move(item, tensor, grad) for (item, tensor), grad in zip(targets, found, strict=True)]
    return loss, grads[: len(params)], moves, _terms(moves, [tensor for _, tensor in targets])


@torch.no_grad()
def _move(item: Measured, tensor: Tensor, grad: Tensor) -> _Move:
    direction = item.coefficient * grad.sign()
    return _Move(item, grad, direction if item.step_of is None else direction * item.step_of(tensor))


@torch.no_grad()
def _terms(moves: list[_Move], tensors: list[Tensor]) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    for move, tensor in zip(moves, tensors, strict=True):
        name = move.measured.name
        terms[name] = terms.get(name, 0) + move.term(tensor)
    return terms


@contextlib.contextmanager
def _moved(moves: list[_Move], unit: Tensor) -> Iterator[list[Tensor]]:
    """Move weights and outputs by ``unit`` times their directions; yield the terms that hold a step.

    The list fills up while the forward pass runs. Weights get back their very values.
    """
    weights = [move for move in moves if isinstance(move.measured.source, Tensor)]
    waiting = [move for move in moves if not isinstance(move.measured.source, Tensor)]
    through_steps: list[Tensor] = []

    def shift(item: Measured, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        move = next((move for move in waiting if move.measured is item), None)
        if move is None:
            raise RuntimeError(
                f"GradL1: {item.name} was computed more often in the second pass than in the first; the "
                "finite difference does not go together with activation checkpointing"
            )
        waiting.remove(move)  # a module that is called twice has two moves, in the order of its calls
        output = output + unit.to(output.dtype) * move.direction
        _add_step_term(through_steps, move, output)
        return output

    with contextlib.ExitStack() as stack:
        for move in weights:
            stack.enter_context(shifted(move.measured.source, unit * move.direction))  # type: ignore[arg-type]
            _add_step_term(through_steps, move, move.measured.source)  # type: ignore[arg-type]
        stack.enter_context(_hooks([move.measured for move in waiting], shift))
        yield through_steps


@contextlib.contextmanager
def autocast_refused(computed: Mapping[str, tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Raise if autocast is on where a module runs: a small move would be rounded away there.

    Args:
        computed: by name a module, and a tensor of its device and type; float64 stays what it is.

    Raises:
        RuntimeError: names the module.
    """

    def look(name: str, like: Tensor, _module: nn.Module, _args: Any) -> None:
        if like.dtype != torch.float64 and autocast_is_on(like.device.type):
            raise RuntimeError(
                f"GradL1: the finite difference needs float32 or float64, and autocast is on where {name} "
                "is computed; a small move is rounded away there"
            )

    with contextlib.ExitStack() as stack:
        for name, (module, like) in computed.items():
            stack.callback(module.register_forward_pre_hook(partial(look, name, like)).remove)
        yield


def _add_step_term(terms: list[Tensor], move: _Move, tensor: Tensor) -> None:
    if move.measured.step_of is not None:
        terms.append(move.measured.coefficient * move.term(tensor))


@contextlib.contextmanager
def _hooks(measured: Sequence[Measured], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(item, module, args, output)`` after each call of a measured module."""
    modules = {id(item): item for item in measured if isinstance(item.source, nn.Module)}
    handles = [
        item.source.register_forward_hook(partial(hook, item))  # type: ignore[union-attr]
        for item in modules.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
