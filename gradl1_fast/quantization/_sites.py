"""The site of every layer by name, whether or not layers share it: what files are written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers, sites_of_layers

__all__ = ["Stored", "by_quantizer", "every_site", "same_range"]

T = TypeVar("T")
Stored = tuple[Tensor | None, Tensor | None, bool]  # ends, and whether of the network's input


def every_site(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizer of each layer, and those that stand alone, by name.

    Whether layers share a site may come out in a forward pass alone; these names do not depend on it.
    """
    sites = dict(sites_of_layers(model))
    known = set(map(id, sites.values()))
    alone = {name: q for name, q in named_quantizers(model).items() if id(q) not in known}
    return sites | alone


def by_quantizer(
    sites: Mapping[str, ActivationQuantizer], values: Mapping[str, T]
) -> list[tuple[str, ActivationQuantizer, T]]:
    """Return the value of each quantizer once, with the name of the first site that it serves."""
    first: dict[int, tuple[str, ActivationQuantizer, T]] = {}
    for name, quantizer in sites.items():
        first.setdefault(id(quantizer), (name, quantizer, values[name]))
    return list(first.values())


def same_range(one: Stored, other: Stored) -> bool:
    """Return whether two ranges have the same ends, or none."""
    pairs = zip(one[:2], other[:2], strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
