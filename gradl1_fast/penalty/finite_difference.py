"""The gradient of the penalty by a finite difference: two ordinary steps instead of double backprop.

The gradient of ``c * ||g||_1`` is ``c * H sign(g)``, the change of the gradient along ``sign(g)``. It is
measured by moving weights and activations by a small amount along the signs of their gradients and computing
the gradient again. With ``scale="step"`` each direction is multiplied by its quantization step, and the part
of the gradient that flows through the step, ``||g||_1 * d step``, is differentiated with the second loss.
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
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.second_pass import RandomState, buffers_kept, shifted
from gradl1_fast.nn.sites import replaced_at
from gradl1_fast.penalty.checks.graph import WHY_NOT_REACHED
from gradl1_fast.penalty.measured import Site, weight_terms

__all__ = ["Measured", "add_gradients", "autocast_refused", "measured_by"]

StepOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """A tensor whose gradient is penalised: a weight, or the tensor at a site.

    Attributes:
        name: the key of its term.
        source: the weight, or the quantizer of the site.
        coefficient: the coefficient of its term.
        step_of: returns the differentiable step of a tensor; None if the norm is not multiplied by a step.
    """

    name: str
    source: Tensor | ActivationQuantizer
    coefficient: float
    step_of: StepOf | None


@dataclass
class _Move:
    """A penalised tensor of the first pass, with its gradient and the direction in which it is moved."""

    measured: Measured
    grad: Tensor
    direction: Tensor

    def term(self, tensor: Tensor) -> Tensor:
        """Return ``sum step * |g|`` for the step of ``tensor``, with the gradient g held constant."""
        step_of = self.measured.step_of
        return (self.grad.abs() if step_of is None else step_of(tensor) * self.grad.abs()).sum()


def measured_by(
    layers: Mapping[str, QuantizedLayer],
    sites: Sequence[Site],
    lambda_w: float,
    lambda_a: float,
    step_bits: int | None,
) -> list[Measured]:
    """Return the tensors measured by a penalty with these coefficients; without ``step_bits``, norms only."""

    def step_of(quantizer: Any) -> StepOf | None:
        return None if step_bits is None else partial(quantizer.step, bits=step_bits)

    weights = weight_terms(layers) if lambda_w else []
    of_weights = [Measured(t.name, t.tensor, lambda_w, step_of(t.layer.weight_quantizer)) for t in weights]
    chosen = sites if lambda_a else []
    return of_weights + [Measured(s.name, s.quantizer, lambda_a, step_of(s.quantizer)) for s in chosen]


def add_gradients(
    model: nn.Module,
    measured: Sequence[Measured],
    closure: Callable[[], Tensor],
    epsilon: float,
    factor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the loss plus ``factor`` times the penalty to each parameter's ``grad``.

    Args:
        model: the model with the parameters and buffers.
        measured: the penalised tensors.
        closure: computes the loss; called twice.
        epsilon: the largest move, in units of weights and activations.
        factor: multiplies the penalty.

    Returns:
        The loss and the terms by name, detached.

    Raises:
        RuntimeError: no measured tensor got a gradient, the second call used other parameters, or
            activations are recomputed in the backward pass.
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
            "GradL1: the closure used different parameters in its second call; it must draw random numbers "
            "from torch's default generators"
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

    by_name = {item.name: item for item in measured}

    def record(name: str, x: Tensor) -> Tensor:
        # A separate tensor, since other readers than the layers are not part of the gradient.
        alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        targets.append((by_name[name], alias))
        return alias

    with replaced_at(_sites(measured), record):
        loss = closure()
    grads = torch.autograd.grad(loss, [*params, *(t for _, t in targets)], allow_unused=True)
    used = [(i, t, g) for (i, t), g in zip(targets, grads[len(params) :], strict=True) if g is not None]
    if not used:
        names = ", ".join(item.name for item in measured)
        raise RuntimeError(f"GradL1: no gradient reached {names}. {WHY_NOT_REACHED}")
    moves = [_move(item, tensor, grad) for item, tensor, grad in used]
    return loss, grads[: len(params)], moves, _terms(moves, [tensor for _, tensor, _ in used])


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
    """Move weights and outputs by ``unit`` times their directions; yield the terms that contain a step.

    The list is filled while the forward pass runs. Weights get their exact values back.
    """
    weights = [move for move in moves if isinstance(move.measured.source, Tensor)]
    waiting = [move for move in moves if not isinstance(move.measured.source, Tensor)]
    through_steps: list[Tensor] = []

    def shift(name: str, x: Tensor) -> Tensor:
        move = next((move for move in waiting if move.measured.name == name), None)
        if move is None:
            raise RuntimeError(
                f"GradL1: {name} was computed more often in the second pass than in the first; the "
                "finite difference does not support activation checkpointing"
            )
        waiting.remove(move)  # a site with several calls has one move per call, in order
        moved = x + unit.to(x.dtype) * move.direction
        _add_step_term(through_steps, move, moved)
        return moved

    with contextlib.ExitStack() as stack:
        for move in weights:
            stack.enter_context(shifted(move.measured.source, unit * move.direction))  # type: ignore[arg-type]
            _add_step_term(through_steps, move, move.measured.source)  # type: ignore[arg-type]
        stack.enter_context(replaced_at(_sites([move.measured for move in waiting]), shift))
        yield through_steps


@contextlib.contextmanager
def autocast_refused(layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """Raise if a layer runs under autocast, which would round small moves away.

    Args:
        layers: the layers by name; autocast does not affect layers of float64.

    Raises:
        RuntimeError: a layer runs under autocast; the message names it.
    """

    def look(name: str, layer: nn.Module, _args: Any) -> None:
        like = next(layer.parameters())
        if like.dtype != torch.float64 and autocast_is_on(like.device.type):
            raise RuntimeError(
                f"GradL1: the finite difference needs float32 or float64, and autocast is on where {name} "
                "is computed, which rounds its small moves away"
            )

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(look, name)).remove)
        yield


def _add_step_term(terms: list[Tensor], move: _Move, tensor: Tensor) -> None:
    if move.measured.step_of is not None:
        terms.append(move.measured.coefficient * move.term(tensor))


def _sites(measured: Sequence[Measured]) -> dict[str, ActivationQuantizer]:
    return {item.name: item.source for item in measured if isinstance(item.source, ActivationQuantizer)}
