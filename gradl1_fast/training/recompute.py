"""Activation checkpointing: parts of a network whose inside is computed again when the backward needs it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d

__all__ = ["recomputing"]

_NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, BatchNormAct2d)


def recomputing(model: nn.Module, parts: int | None = None) -> nn.Module:
    """Return a network with the same modules, which keeps the activations between its parts alone.

    What is inside a part is computed twice, without reentry, so that gradients of gradients are right,
    and with the same random numbers. Statistics of batch norms count each batch once. The first
    backward of a penalty needs all of it again at once: memory is saved in plain steps.

    Args:
        model: a converted model; it stays as it is, and shares its modules with the result.
        parts: how many; None for the square root of the number of operations.

    Raises:
        ValueError: the model was not traced, so that there is no graph to cut.
    """
    if not isinstance(model, fx.GraphModule):
        raise ValueError("checkpointing needs a model that torch.fx can trace; this one was not traced")
    calls = [node for node in model.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    length = math.ceil(len(calls) / (parts or round(math.sqrt(len(calls)))))
    part_of = {node: place // length for place, node in enumerate(calls)}
    cut = split_module(model, model, lambda node: part_of.get(node, 0), keep_original_order=True)
    for name, part in list(cut.named_children()):
        setattr(cut, name, _Part(part))
    return cut


class _Part(nn.Module):
    """A part of a network, computed again when its inside is needed."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.inside, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _StatisticsKept(self.inside)


class _StatisticsKept:
    """Lets batch norms normalise by the batch without a change of their running statistics.

    It can be entered again: gradients of gradients compute the activations once more.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _NORMALISATIONS) and m.track_running_stats]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.track_running_stats = False

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.track_running_stats = True
