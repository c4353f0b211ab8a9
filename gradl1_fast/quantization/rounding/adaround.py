"""AdaRound: each value is rounded down or up, as is learned by descent on the error of the layer's output.

Between floor and the next code lies ``h = clamp(1.2 sigmoid(V) - 0.1, 0, 1)``, and ``V`` is learned. A
regulariser ``1 - |2 h - 1|^beta`` drives each ``h`` to 0 or 1, ever harder as ``beta`` falls.

Layer by layer the error is a quadratic form of the second moments of the inputs, so that each step of the
descent sees all of the data at the cost of a small matrix product.

Source: Nagel et al. 2020, arXiv 2004.10568, section 3.2 and 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast._progress import track
from gradl1_fast.quantization.rounding.base import INPUTS, Problem, RoundingMethod

__all__ = ["AdaRound"]

_LOW, _HIGH = -0.1, 1.1  # ends of the stretched sigmoid, before it is clamped
_BETA = 20.0, 2.0
_WARM = 0.2  # share of the steps before the regulariser


class AdaRound(RoundingMethod):
    """Learns for each value of a weight whether it is rounded down or up. Minutes a network.

    Args:
        steps: of Adam, for each layer.
        lr: its learning rate.
        strength: of the regulariser, against the error relative to that of rounding at random.
        inputs: what the layer is given; see :class:`gradl1_fast.rounding.GPTQ`.
    """

    def __init__(
        self, *, steps: int = 1000, lr: float = 0.05, strength: float = 1.0, inputs: str = "renormalised"
    ) -> None:
        self.steps = check.count("AdaRound: steps", steps)
        self.lr = check.coefficient("AdaRound: lr", lr)
        self.strength = check.coefficient("AdaRound: strength", strength)
        self.inputs = check.one_of("AdaRound: inputs", inputs, INPUTS)

    def codes(self, problem: Problem) -> Tensor:
        """Return the codes; of a row for which nearest ones are better, those."""
        floor = (problem.weight / problem.scale).floor()
        rest = problem.weight / problem.scale - floor
        with torch.enable_grad():
            up = self._learned(problem, floor, rest)
        codes = (floor + (up >= 0.5)).clamp(problem.q_min, problem.q_max)
        return problem.better(codes, problem.nearest(problem.weight))

    def _learned(self, problem: Problem, floor: Tensor, rest: Tensor) -> Tensor:
        """Return ``h`` after the descent."""
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
    """Return by how much the error of a group's row grows for each column rounded at random, in codes."""
    mean = problem.moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(mean > 0, mean, 1)[:, None, None]


def _stretched(v: Tensor) -> Tensor:
    return (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _inverse(h: Tensor) -> Tensor:
    """Return where the stretched sigmoid has a value."""
    return torch.logit((h - _LOW) / (_HIGH - _LOW))
