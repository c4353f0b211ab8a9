"""Distributions of initial weights, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check

__all__ = ["INITIALISERS", "initialise"]

# Names say fan-scaled distributions (He, Glorot) or a fixed standard deviation or end.
INITIALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "he-normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "he-uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "glorot-normal": nn.init.xavier_normal_,
    "glorot-uniform": nn.init.xavier_uniform_,
    "normal-0.02": partial(nn.init.normal_, std=0.02),
    "normal-0.1": partial(nn.init.normal_, std=0.1),
    "uniform-0.05": partial(nn.init.uniform_, a=-0.05, b=0.05),
    "uniform-0.2": partial(nn.init.uniform_, a=-0.2, b=0.2),
}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def initialise(model: nn.Module, name: str) -> None:
    """Draw the weights of all convolutions and linear layers from torch's generator; biases become 0.

    Args:
        model: any module; batch norms stay as they are.
        name: a key of :data:`INITIALISERS`.

    Raises:
        ValueError: there is no such initialiser.

    Source: the comparison in Yun and Wong 2020, arXiv 2011.14578.
    """
    draw = INITIALISERS[check.one_of("initialiser", name, tuple(INITIALISERS))]
    for module in model.modules():
        if isinstance(module, _LAYERS):
            draw(module.weight)
            if module.bias is not None:
                module.bias.zero_()
