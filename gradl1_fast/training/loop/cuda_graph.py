"""A whole training step, captured once in a CUDA graph and replayed on new images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gradl1_fast.training.data import Batch
from gradl1_fast.training.methods import Terms

__all__ = ["GraphedStep"]

WARM_UP = 3  # steps before the capture, in which libraries choose algorithms and allocate


class GraphedStep:
    """Replays a captured step; the steps that a capture needs before it leave no trace.

    Args:
        model: whose parameters and buffers the step changes.
        optimizer: made with ``capturable=True``.
        step: computes gradients for a batch, changes the weights, and returns the terms; it waits for
            the device nowhere.
        example: a batch, for the shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[[Batch], Terms],
        example: Batch,
    ) -> None:
        self._batch = example[0].clone(), example[1].clone()
        before = _snapshot(model, optimizer)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._terms = step(self._batch)
        _restore(model, optimizer, before)

    def __call__(self, batch: Batch) -> Terms:
        """Take the step on a batch of the same shape."""
        for mine, new in zip(self._batch, batch, strict=True):
            mine.copy_(new)
        self._graph.replay()
        parts = {name: part.clone() for name, part in self._terms.parts.items()}
        return Terms(self._terms.loss.clone(), self._terms.penalty.clone(), parts)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[object, Tensor]]:
    """Yield what a step changes, each tensor with a key."""
    for key, value in model.state_dict(keep_vars=True).items():
        yield key, value
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield (id(parameter), name), value


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[object, Tensor]:
    return {key: value.detach().clone() for key, value in _tensors(model, optimizer)}


@torch.no_grad()
def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, before: dict[object, Tensor]) -> None:
    """Write the values back in place: the graph knows the addresses. New optimizer state begins at 0."""
    for key, value in _tensors(model, optimizer):
        if key in before:
            value.copy_(before[key])
        else:
            value.zero_()
