"""Which share of a model's multiply-adds computes in float at any width."""

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
    """Run a forward pass; warn if more than a twentieth of its multiply-adds is in no layer of this library.

    Those are products of two activations, as in attention, and weights that are used by function or in
    modules that conversion leaves alone.

    Args:
        model: a converted model, at float width.
        run: calls it on a batch.

    Returns:
        What ``run`` returns.
    """
    inside = 0

    def count(layer: Any, args: Any, y: Tensor) -> None:
        nonlocal inside
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        one, axis = (args[0], 0) if transposed else (y, layer.out_axis)
        inside += one.numel() * (layer.weight.numel() // layer.weight.shape[axis])

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
    """Counts multiply-adds by PyTorch's own formulas.

    Attributes:
        total: of all operations.
        operations: names of those that have any.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # which takes as long to import as this library

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
            f"activations, or weights used by function (the model computes {', '.join(sorted(operations))}); "
            "see gradl1_fast.report(model)",
            stacklevel=4,
        )
