"""Run an operation forward, backward and backward through the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.cases import Case, random

Layout = Callable[[Tensor], Tensor]


class Sweeps(NamedTuple):
    """Results of the three sweeps; ``second`` are the gradients of the inputs, then of ``dy``."""

    y: Tensor
    first: list[Tensor]
    second: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [self.y, *self.first, *self.second]


def as_it_is(t: Tensor) -> Tensor:
    return t


def sweep(
    case: Case,
    *,
    truth: bool = False,
    dtype: torch.dtype = torch.float64,
    inputs: Layout = as_it_is,
    gradients: Layout = as_it_is,
) -> Sweeps:
    """Compute all three sweeps with random cotangents; the l1 term is the last of ``first``.

    Args:
        case: what to compute.
        truth: use the case's truth instead of the operation.
        dtype: of everything.
        inputs: changes the layout of the inputs.
        gradients: changes that of the incoming gradients, of both backward sweeps.
    """
    leaves = [leaf(inputs(t)) for t in case.inputs(dtype)]
    probe = scalar_probe(leaves[0]) if case.probe else None
    y = case.truth(*leaves) if truth else case.call(leaves, probe)
    dy = leaf(gradients(random_like(y, 11)))
    asked = leaves if truth or probe is None else [*leaves, probe]
    first = list(torch.autograd.grad(y, asked, dy, create_graph=True))
    if probe is not None and truth:
        first.append(dy.abs().sum(dtype=probe.dtype))
    cotangents = [gradients(random_like(g, 20 + i)) for i, g in enumerate(first)]
    second = torch.autograd.grad(first, [*leaves, dy], cotangents, allow_unused=True, retain_graph=True)
    return Sweeps(y, first, list(second))


def random_like(t: Tensor, seed: int) -> Tensor:
    return random(tuple(t.shape), seed).to(t.dtype)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def scalar_probe(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), requires_grad=True)
