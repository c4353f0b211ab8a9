"""Counting convolutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast.backends import reference


class Convolutions(TorchDispatchMode):
    """Counts fprop, dgrad and wgrad, also inside the registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "gradl1_fast" and name.startswith("conv_"):
            with self:
                return getattr(reference, name)(*args)
        if func is torch.ops.aten.convolution.default:
            self.counts["fprop"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            dgrad, wgrad, _ = args[-1]
            self.counts.update({"dgrad": int(dgrad), "wgrad": int(wgrad)})
        else:
            assert "convolution" not in name
        return func(*args, **(kwargs or {}))
