"""The sites by the name of each of their layers, as used in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers, sites_of_layers

__all__ = ["Stored", "by_quantizer", "every_site", "same_range"]

T = TypeVar("T")
Stored = tuple[Tensor | None, Tensor | None, bool]  # both ends, and whether the site is the network's input


def every_site(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizer of each layer, and quantizers without a layer, by name.

    A forward pass may show that layers share a site; these names do not depend on it.
    """
    sites = dict(sites_of_layers(model))
    names = set(map(id, sites.values()))
    alone = {name: q for name, q in named_quantizers(model).items() if id(q) not in names}
    return sites | alone


def by_quantizer(
    sites: Mapping[str, ActivationQuantizer], values: Mapping[str, T]
) -> list[tuple[str, ActivationQuantizer, T]]:
    """Return the value of each distinct quantizer, with the name of its first site."""
    first: dict[int, tuple[str, ActivationQuantizer, T]] = {}
    for name, quantizer in sites.items():
        first.setdefault(id(quantizer), (name, quantizer, values[name]))
    return list(first.values())


def same_range(first: Stored, second: Stored) -> bool:
    """Return whether two ranges have equal ends, or both have none."""
    pairs = zip(first[:2], second[:2], strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
