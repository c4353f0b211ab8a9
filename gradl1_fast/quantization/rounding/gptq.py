"""GPTQ: rounds columns one after another, and compensates each error in the following columns.

With ``H = E[x x^T]`` and the upper Cholesky factor ``U`` of ``H^-1``, the optimal change of the columns after
``i`` for an error ``e`` of column ``i`` is ``-e U[i, i+1:] / U[i, i]``.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast.quantization.rounding.base import INPUTS, Problem, RoundingMethod

__all__ = ["GPTQ"]


class GPTQ(RoundingMethod):
    """Rounds the columns of a weight in order, with error feedback. Closed form, takes seconds per layer.

    Args:
        damping: added to the diagonal of ``H``, as a share of its mean; more than 0.
        block: number of columns between updates of all following columns; affects the time, not the result.
        order: round the columns with the largest ``H[i, i]`` first, which measured better on every layer.
        inputs: the inputs of the layer. ``"rounded"``: computed with already rounded layers and quantized
            activations, to compensate for their errors too; runs the model once per layer.
            ``"renormalised"``: the same, with batch norms that use the statistics of each batch, as after
            :func:`gradl1_fast.reestimate_batch_norm`; needs batches of at least a hundred examples.
            ``"float"``: the inputs in float, from one pass for all layers.
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
        """Return the codes; rows for which the nearest codes are better get these."""
        order = self._order(problem.moments)
        codes = self._in_order(problem, order)
        return problem.better(codes, problem.nearest(problem.weight))

    def _order(self, moments: Tensor) -> Tensor:
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        if self.order:
            return diagonal.argsort(dim=-1, descending=True, stable=True)
        return torch.arange(diagonal.shape[-1], device=moments.device).expand(diagonal.shape)

    def _in_order(self, problem: Problem, order: Tensor) -> Tensor:
        indices = order[:, None].expand_as(problem.weight)
        factor = inverse_factor(_reordered(problem.moments, order), self.damping)
        rest = problem.weight.gather(-1, indices)
        codes = torch.empty_like(rest)
        for start in range(0, rest.shape[-1], self.block):
            end = min(start + self.block, rest.shape[-1])
            errors = self._round_block(problem, rest, codes, factor, start, end)
            rest[..., end:] -= errors @ factor[:, start:end, end:]
        return torch.empty_like(codes).scatter_(-1, indices, codes)

    def _round_block(
        self, problem: Problem, rest: Tensor, codes: Tensor, factor: Tensor, start: int, end: int
    ) -> Tensor:
        """Round the columns of a block; return their errors divided by the diagonal of the factor."""
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

    A column that is always zero gets 1 on the diagonal, so it is rounded to nearest and affects no other.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(-1, keepdim=True) + (diagonal == 0)
    damped = moments + torch.diag_embed(added)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _reordered(moments: Tensor, order: Tensor) -> Tensor:
    rows = moments.gather(-2, order[..., None].expand_as(moments))
    return rows.gather(-1, order[:, None].expand_as(moments))
