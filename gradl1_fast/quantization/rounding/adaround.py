"""AdaRound: learns to round each value down or up by gradient descent on the error of the layer's output.

The code is the floor plus ``h = clamp(1.2 sigmoid(V) - 0.1, 0, 1)`` with a learned ``V``. The regulariser
``1 - |2 h - 1|^beta`` drives each ``h`` to 0 or 1, more strongly as ``beta`` decreases.

For each layer, the error is a quadratic form of the second moments of the inputs, so each step uses all data
at the cost of a small matrix product.

Source: Nagel et al. 2020, arXiv 2004.10568, section 3.2 and 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast._progress import track
from gradl1_fast.quantization.rounding.base import INPUTS, Problem, RoundingMethod

__all__ = ["AdaRound"]

_LOW, _HIGH = -0.1, 1.1  # range of the stretched sigmoid before clamping
_BETA = 20.0, 2.0
_WARM = 0.2  # share of the steps before the regulariser


class AdaRound(RoundingMethod):
    """Learns whether to round each value of a weight down or up. Takes minutes per network.

    Args:
        steps: the number of Adam steps per layer.
        lr: the learning rate of Adam.
        strength: the coefficient of the regulariser, relative to the error of random rounding.
        inputs: the inputs of the layer; see :class:`gradl1_fast.rounding.GPTQ`.
    """

    def __init__(
        self, *, steps: int = 1000, lr: float = 0.05, strength: float = 1.0, inputs: str = "renormalised"
    ) -> None:
        self.steps = check.count("AdaRound: steps", steps)
        self.lr = check.coefficient("AdaRound: lr", lr)
        self.strength = check.coefficient("AdaRound: strength", strength)
        self.inputs = check.one_of("AdaRound: inputs", inputs, INPUTS)

    def codes(self, problem: Problem) -> Tensor:
        """Return the codes; rows for which the nearest codes are better get these."""
        floor = (problem.weight / problem.scale).floor()
        rest = problem.weight / problem.scale - floor
        with torch.enable_grad():
            up = self._learned(problem, floor, rest)
        codes = (floor + (up >= 0.5)).clamp(problem.q_min, problem.q_max)
        return problem.better(codes, problem.nearest(problem.weight))

    def _learned(self, problem: Problem, floor: Tensor, rest: Tensor) -> Tensor:
        """Return ``h`` after training."""
        ends = problem.q_min, problem.q_max
        scale = _unit(problem)
        moments, floor, rows = (t.float() for t in (problem.moments / scale, floor, floor + rest))
        v = _inverse(rest.float()).requires_grad_()
        optimizer = torch.optim.Adam([v], self.lr)
        for step in track(range(self.steps), "adaround"):
            h = _stretched(v)
            d = rows - (floor + h).clamp(*ends)
            loss = ((d @ moments) * d).sum() + self._regulariser(h, step / self.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return _stretched(v.detach())

    def _regulariser(self, h: Tensor, time: float) -> Tensor:
        if time < _WARM:
            return h.new_zeros(())
        start, end = _BETA
        beta = end + (start - end) * (1 - (time - _WARM) / (1 - _WARM))
        return self.strength * (1 - (2 * h - 1).abs().pow(beta)).sum()


def _unit(problem: Problem) -> Tensor:
    """Return the increase of the error of a group's row per randomly rounded column, in codes."""
    mean = problem.moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(mean > 0, mean, 1)[:, None, None]


def _stretched(v: Tensor) -> Tensor:
    return (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _inverse(h: Tensor) -> Tensor:
    """Return the inverse of the stretched sigmoid."""
    return torch.logit((h - _LOW) / (_HIGH - _LOW))
