"""GPTQ: columns are rounded one after another, and those that follow make up for the error so far.

With ``H = E[x x^T]`` and ``U`` the upper Cholesky factor of ``H^-1``, the best change of the columns after
``i``, where column ``i`` has the error ``e``, is ``-e U[i, i+1:] / U[i, i]``.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast.quantization.rounding.base import INPUTS, Problem, RoundingMethod

__all__ = ["GPTQ"]


class GPTQ(RoundingMethod):
    """Rounds the columns of a weight in order, with error feedback. Closed form, seconds a layer.

    Args:
        damping: added to the diagonal of ``H``, as a share of its mean; more than 0.
        block: columns between updates of all that follow; it changes the time, not the result.
        order: round the columns with the largest ``H[i, i]`` first, which measured better on every layer.
        inputs: what the layer is given. ``"rounded"``: what layers that are rounded already and quantized
            activations give it, so that it makes up for their errors too; the data pass through the model
            once for each layer. ``"renormalised"``: the same, with batch norms that normalise each batch by
            its own statistics, as they will once :func:`gradl1_fast.reestimate_batch_norm` was called;
            batches then have at least a hundred examples. ``"float"``: what it is given in float, in one pass
            for all layers.
    """

    def __init__(
        self, *, damping: float = 0.01, block: int = 128, order: bool = True, inputs: str = "renormalised"
    ) -> None:
        self.damping = check.coefficient("GPTQ: damping", damping)
        if not self.damping:
            raise ValueError("GPTQ: damping must be more than 0")
        self.block = check.count("GPTQ: block", block)
        self.order = order
        self.inputs = check.one_of("GPTQ: inputs", inputs, INPUTS)

    def codes(self, problem: Problem) -> Tensor:
        """Return the codes; of a row for which nearest ones are better, those."""
        order = self._order(problem.moments)
        codes = self._in_order(problem, order)
        return problem.better(codes, problem.nearest(problem.weight))

    def _order(self, moments: Tensor) -> Tensor:
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        if self.order:
            return diagonal.argsort(dim=-1, descending=True, stable=True)
        return torch.arange(diagonal.shape[-1], device=moments.device).expand(diagonal.shape)

    def _in_order(self, problem: Problem, order: Tensor) -> Tensor:
        places = order[:, None].expand_as(problem.weight)
        factor = inverse_factor(_reordered(problem.moments, order), self.damping)
        rest = problem.weight.gather(-1, places)
        codes = torch.empty_like(rest)
        for start in range(0, rest.shape[-1], self.block):
            end = min(start + self.block, rest.shape[-1])
            errors = self._round_block(problem, rest, codes, factor, start, end)
            rest[..., end:] -= errors @ factor[:, start:end, end:]
        return torch.empty_like(codes).scatter_(-1, places, codes)

    def _round_block(
        self, problem: Problem, rest: Tensor, codes: Tensor, factor: Tensor, start: int, end: int
    ) -> Tensor:
        """Round the columns of a block; return their errors over the diagonal of the factor."""
        errors = torch.empty_like(rest[..., start:end])
        for i in range(start, end):
            column = rest[..., i : i + 1]
            codes[..., i : i + 1] = problem.nearest(column)
            error = (column - codes[..., i : i + 1] * problem.scale) / factor[:, i, i, None, None]
            rest[..., i + 1 : end] -= error * factor[:, i : i + 1, i + 1 : end]
            errors[..., i - start : i - start + 1] = error
        return errors


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped moments.

    A column that is always zero gets a one on the diagonal: it is rounded to nearest and changes no other.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(-1, keepdim=True) + (diagonal == 0)
    damped = moments + torch.diag_embed(added)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _reordered(moments: Tensor, order: Tensor) -> Tensor:
    rows = moments.gather(-2, order[..., None].expand_as(moments))
    return rows.gather(-1, order[:, None].expand_as(moments))
