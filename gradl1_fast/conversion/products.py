"""Measures the share of multiply-adds that is computed in float at every bit width."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer

__all__ = ["warn_of_float_products"]

_WORTH_A_WARNING = 0.05


def warn_of_float_products(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run a forward pass, and warn if more than 5 % of its multiply-adds are outside our layers.

    These are products of two activations, as in attention, and products with weights that are used by
    functions or by modules that conversion does not replace.

    Args:
        model: a converted model, in float.
        run: calls the model on a batch.

    Returns:
        The result of ``run``.
    """
    inside = 0

    def count(layer: Any, args: Any, y: Tensor) -> None:
        nonlocal inside
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        tensor, axis = (args[0], 0) if transposed else (y, layer.out_axis)
        inside += tensor.numel() * (layer.weight.numel() // layer.weight.shape[axis])

    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and not isinstance(m, QEmbedding)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad(), _Products() as products:
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    _warn(products.total, inside, products.operations)
    return result


class _Products(TorchDispatchMode):
    """Counts multiply-adds with PyTorch's own formulas.

    Attributes:
        total: the multiply-adds of all operations.
        operations: the names of operations with multiply-adds.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # slow to import

        self.total, self.operations = 0, set[str]()
        self._formulas = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result) // 2
            self.operations.add(func._overloadpacket.__name__)
        return result


def _warn(total: int, inside: int, operations: set[str]) -> None:
    share = 1 - inside / total if total else 0.0
    if share > _WORTH_A_WARNING:
        warnings.warn(
            f"calibrate: {share:.0%} of the multiply-adds stay in float at any width: products of "
            f"activations, or weights used by functions (the model calls {', '.join(sorted(operations))}); "
            "see gradl1_fast.report(model)",
            stacklevel=4,
        )
