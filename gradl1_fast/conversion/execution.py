"""Computes the fused calls of a plan's graph with the registered operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast import functional as F
from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.conversion.fusion import fuse
from gradl1_fast.conversion.graphs import returns_input
from gradl1_fast.conversion.regions.statistics import share_of_batch
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sharing import leave_note

__all__ = ["batch_norm_act", "fused"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
}


def fused(container: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Return a copy of a container's graph in which batch norms are fused with the operations that follow."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    copy.owning_module = container  # type: ignore[assignment]  # fx looks up impure modules in it
    for node in list(copy.nodes):  # layers before and after an identity share a tensor
        if returns_input(container, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            copy.erase_node(node)
    fuse(container, copy, batch_norm_act)
    return copy


def batch_norm_act(
    norm: nn.BatchNorm2d, x: Tensor, residual: Any, activation: str, reader: QuantizedLayer | None
) -> Tensor:
    """Return ``activation(norm(x) + residual)``, quantized and measured if only one site reads it.

    Args:
        norm: the batch norm; its running statistics are updated in training.
        x: ``(N, C, *size)``.
        residual: added before the activation. The sum and the activation are not fused if the residual is a
            number, has another type, or does not broadcast to the shape of ``x``.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        reader: a layer whose site is the only reader of the result, or None.
    """
    norm._check_input_dim(x)
    if residual is not None and not _fits(residual, x):
        return _ACTIVATIONS[activation](_normalize(norm, x, None, "none") + residual)
    quantizer = None if reader is None else reader.input_quantizer
    if quantizer is None or quantizer.is_idle or not quantizer.is_foldable:
        return _normalize(norm, x, residual, activation)
    y = _normalize(norm, x, residual, activation, quantizer)
    quantizer.is_known = True
    leave_note(y, quantizer, None, None, is_itself=True)
    return y


def _normalize(
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    quantizer: ActivationQuantizer | None = None,
) -> Tensor:
    tracked = not norm.training or norm.track_running_stats
    grid = None
    if quantizer is not None and quantizer.bits is not None:
        grid = quantizer.grid(sum_dtype(x.dtype), quantizer.bits)
    return F.batch_norm_act(
        x,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.weight,
        norm.bias,
        training=norm.training or norm.running_mean is None,
        momentum=_count_batch(norm),
        eps=norm.eps,
        residual=residual,
        activation=activation,
        grid=grid,
        probe=None if quantizer is None or not quantizer.is_measured else quantizer.probe,
    )


def _count_batch(norm: nn.BatchNorm2d) -> float:
    """Count a training batch and return its weight in the running statistics."""
    if not (norm.training and norm.track_running_stats):
        return 0.0
    if norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
    return share_of_batch(norm)


def _fits(residual: Any, x: Tensor) -> bool:
    """Return whether ``residual`` has the type of ``x`` and can be expanded to its shape."""
    if not isinstance(residual, Tensor) or residual.dim() > x.dim() or residual.dtype != x.dtype:
        return False
    sizes = zip(reversed(residual.shape), reversed(x.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in sizes)
