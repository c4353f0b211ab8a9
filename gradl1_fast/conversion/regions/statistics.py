"""The running statistics of all batch norms of a region, updated together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["share_of_batch", "update_statistics"]


def update_statistics(of_batch: Sequence[tuple[Any, Tensor, Tensor, int]]) -> None:
    """Update the running statistics of batch norms in the same way as their own forward pass.

    Args:
        of_batch: for each batch norm, in order: module, mean, 1/std and number of values in a channel.
    """
    seen: set[int] = set()
    group: list[tuple[Any, Tensor, Tensor, int]] = []
    for entry in of_batch:  # a module that is called twice is updated twice, in order
        if id(entry[0]) in seen:
            _update(group)
            seen, group = set(), []
        seen.add(id(entry[0]))
        group.append(entry)
    _update(group)


def _update(entries: Sequence[tuple[Any, Tensor, Tensor, int]]) -> None:
    groups: dict[Any, list[tuple[Any, Tensor, Tensor, int]]] = {}
    _count([norm for norm, *_ in entries])
    for entry in entries:
        norm, mean = entry[:2]
        if norm.training and norm.track_running_stats:
            groups.setdefault(
                (share_of_batch(norm), norm.eps, norm.running_mean.dtype, mean.dtype), []
            ).append(entry)
    for (share, eps, dtype, _), group in groups.items():
        means, rstds = [entry[1] for entry in group], [entry[2] for entry in group]
        variances = list(torch._foreach_mul(rstds, rstds))
        torch._foreach_reciprocal_(variances)
        torch._foreach_sub_(variances, eps)
        torch._foreach_clamp_min_(variances, 0.0)
        torch._foreach_mul_(variances, [count / (count - 1) for *_, count in group])
        if dtype != means[0].dtype:
            means, variances = ([value.to(dtype) for value in values] for values in (means, variances))
        torch._foreach_lerp_([entry[0].running_mean for entry in group], means, share)
        torch._foreach_lerp_([entry[0].running_var for entry in group], variances, share)


def _count(norms: Sequence[Any]) -> None:
    counters = [n.num_batches_tracked for n in norms if n.training and n.track_running_stats]
    counters = [counter for counter in counters if counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def share_of_batch(norm: Any) -> float:
    """Return the weight of the current batch in the running statistics."""
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
