"""Collects the penalised activations of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradl1_fast.nn.sharing import mark_input
from gradl1_fast.nn.sites import replaced_at
from gradl1_fast.penalty.measured import activation_sites

__all__ = ["seen_at_sites"]


@contextlib.contextmanager
def seen_at_sites(model: nn.Module, wanted: bool = True) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect the tensors at the penalised sites of a model inside the block.

    Each is a separate tensor that only the layers read, so its gradient is the gradient from the layers.

    Args:
        model: a converted model.
        wanted: if False, nothing is collected.

    Yields:
        The list of names and tensors, in the order of the forward pass, with one entry per call of a site.
    """
    quantizers = {site.name: site.quantizer for site in activation_sites(model)} if wanted else {}
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str, x: Tensor) -> Tensor:
        if quantizers[name].is_input:  # set by this forward pass
            return x
        # A tensor that depends only on frozen layers requires no gradient.
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        seen.append((name, own))
        return own

    handle = model.register_forward_pre_hook(_mark_inputs, with_kwargs=True)
    try:
        with replaced_at(quantizers, keep):
            yield seen
    finally:
        handle.remove()


def _mark_inputs(_model: nn.Module, args: Any, kwargs: Any) -> None:
    """Mark the inputs of a network that could not be traced."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            mark_input(value)
