"""Evaluates a model at several widths in parallel, in threads that share its weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

__all__ = ["parallel_map"]


def parallel_map(
    model: nn.Module, task: Callable[[nn.Module, T], float], items: Sequence[T], workers: int
) -> Iterator[float]:
    """Yield ``task(replica, item)`` for each item, in order; at most ``workers`` run at once.

    A replica has separate modules with the parameters and buffers of ``model``, so its widths may differ and
    no large tensors are copied. Torch's threads are divided among the workers. Workers use the gradient mode
    of the caller, and its autocast setting for the model's device.

    Args:
        model: a model in evaluation mode, since replicas in training mode would change shared statistics.
        task: the function to call for each item.
        items: the items.
        workers: the number of threads.

    Raises:
        ValueError: a module of ``model`` is in training mode.
    """
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"several workers need evaluation mode, but {training[0]} is in training mode: call model.eval()"
        )
    replicas: SimpleQueue[nn.Module] = SimpleQueue()
    for _ in range(workers):
        replicas.put(_replica(model))
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    device = next((p.device.type for p in model.parameters()), "cpu")
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def run(item: T) -> float:
        replica = replicas.get()
        try:
            with torch.set_grad_enabled(gradients), torch.autocast(device, dtype, enabled=enabled):
                return task(replica, item)
        finally:
            replicas.put(replica)

    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(run, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _replica(model: nn.Module) -> nn.Module:
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
