"""Whether a product reads a weight as it is, seen below everything that Python code may do with it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("aten::convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")


@contextlib.contextmanager
def float_weights(model: nn.Module, layers: Collection[str]) -> Iterator[set[str]]:
    """Yield a set that fills with the layers, of those named, whose parameter goes into a product."""
    weights = {name: model.get_submodule(name)._parameters.get("weight") for name in layers}
    owners = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if w is not None}
    found: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in PRODUCTS:
                for t in tree_leaves(args):
                    if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in owners:
                        found.add(owners[t.untyped_storage().data_ptr()])
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found
