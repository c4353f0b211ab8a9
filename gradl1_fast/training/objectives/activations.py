"""The activations that a penalty counts, as tensors of one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gradl1_fast.nn.sites import Site

__all__ = ["outputs_of"]


@contextlib.contextmanager
def outputs_of(sites: Sequence[Site]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect by name what the producers of activations give while the context lasts, each call by itself."""
    found: list[tuple[str, Tensor]] = []

    def collector(name: str) -> Any:
        def collect(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # behind frozen layers alone
                output = output.detach().requires_grad_()
            found.append((name, output))
            return output

        return collect

    handles = [site.producer.register_forward_hook(collector(site.name)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
