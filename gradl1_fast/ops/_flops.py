"""Formulas for ``torch.utils.flop_counter``, which cannot see the kernels inside our operators.

That module imports Triton if it is installed, so the formulas are registered only once other code imports it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]
# Takes the shapes of output, input and weight; returns the number of positions of the weight.
_Positions = Callable[[_Shape, _Shape, _Shape], int]
_POSITIONS: dict[str, _Positions] = {
    "conv": lambda y, x, weight: y[0] * math.prod(y[2:]),
    "conv_transpose": lambda y, x, weight: x[0] * math.prod(x[2:]),
    "linear": lambda y, x, weight: math.prod(x[:-1]),
}


def register_when_counted() -> None:
    """Register the formulas now if PyTorch's counter has been imported, otherwise on its import."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Import hook whose loader registers the formulas after the import of the counter."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    for op, positions in _POSITIONS.items():
        for sweep, formula in zip(
            ("forward", "backward", "double_backward"), _formulas(positions), strict=True
        ):
            counter.register_flop_formula(getattr(torch.ops.gradl1_fast, f"{op}_{sweep}"))(formula)


def _formulas(positions: _Positions) -> tuple[Callable[..., int], ...]:
    """Return the formulas of the three passes. Each product of two tensors costs the same."""

    def product(y: _Shape, x: _Shape, weight: _Shape) -> int:
        return 2 * positions(y, x, weight) * math.prod(weight)

    def forward(x: _Shape, weight: _Shape, *_: Any, out_shape: _Shape) -> int:
        return product(out_shape, x, weight)

    def backward(dy: _Shape, x: _Shape, weight: _Shape, *geometry_and_mask: Any, **_: Any) -> int:
        return sum(geometry_and_mask[-1]) * product(dy, x, weight)

    def double_backward(
        d_dx: _Shape | None,
        d_dweight: _Shape | None,
        dy: _Shape,
        x: _Shape,
        weight: _Shape,
        *rest: Any,
        **_: Any,
    ) -> int:
        of_dy, of_x, of_weight = rest[-1]
        both = (d_dx is not None) + (d_dweight is not None)
        products = of_dy * both + (of_x and d_dweight is not None) + (of_weight and d_dx is not None)
        return products * product(dy, x, weight)

    return forward, backward, double_backward
