"""Which share of a model's multiply-adds computes in float at any width."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer

__all__ = ["warn_of_float_products"]

_WORTH_A_WARNING = 0.05


def warn_of_float_products(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run a forward pass; warn if more than a twentieth of its multiply-adds is in no layer of this library.

    Those are products of two activations, as in attention, and weights that are used by function or in
    modules that conversion leaves alone.

    Args:
        model: a converted model, at float width.
        run: calls it on a batch.

    Returns:
        What ``run`` returns.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which takes as long to import as this library

    inside = 0

    def count(layer: Any, args: Any, y: Tensor) -> None:
        nonlocal inside
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        one, axis = (args[0], 0) if transposed else (y, layer.out_axis)
        inside += one.numel() * (layer.weight.numel() // layer.weight.shape[axis])

    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and not isinstance(m, QEmbedding)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    _warn(counter.get_total_flops() / 2, inside, counter.get_flop_counts().get("Global", {}))
    return result


def _warn(total: float, inside: int, operations: dict[Any, int]) -> None:
    share = 1 - inside / total if total else 0.0
    if share > _WORTH_A_WARNING:
        names = ", ".join(sorted(str(operation) for operation in operations))
        warnings.warn(
            f"calibrate: {share:.0%} of the multiply-adds stay in float at any width: products of "
            f"activations, or weights used by function (the model computes {names}); see "
            "gradl1_fast.report(model)",
            stacklevel=4,
        )
