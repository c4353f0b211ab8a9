"""Checks that stored codes still belong to their weight.

Codes from :func:`gradl1_fast.round_weights` are valid for one weight and one range, which are identified by
digests that depend on every value and its position. Rounding the weight to a narrower type does not count as
a change; any other change does. The digest is cached while the same tensor is used and its version and a
sample of its values are unchanged.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["MadeFor", "digests"]

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1 << 16
_SAMPLES = 64
_FACTOR = 0x9E3779B97F4A7C15  # golden ratio in 64 bits, for Fibonacci hashing


def digests(x: Tensor | None) -> tuple[int, ...]:
    """Return the digests of a tensor in each floating type; empty for None."""
    return () if x is None else tuple(_digest(x.detach().to(dtype)) for dtype in _TYPES)


class MadeFor:
    """The weight and the stored range that codes were chosen for.

    Args:
        weight: digests of the weight.
        clip: digests of the stored range; empty for the range of the weight itself.
        name: the name of the layer, for messages.
    """

    def __init__(self, weight: tuple[int, ...], clip: tuple[int, ...], name: str) -> None:
        self.weight, self.clip, self.name = weight, clip, name
        self._seen: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, weight: Tensor, clip: Tensor | None, name: str) -> MadeFor:
        """Return the record of a weight and its stored range."""
        return cls(digests(weight), digests(clip), name)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the cache, since a copy has other tensors."""
        return {**vars(self), "_seen": None}

    def holds(self, weight: Tensor, clip: Tensor | None) -> bool:
        """Return whether the codes were chosen for a weight and its stored range."""
        if self._seen is not None and _is_seen(self._seen, weight, clip):
            return True
        same = _digest(weight.detach()) in self.weight
        same = same and (not self.clip if clip is None else _digest(clip) in self.clip)
        if same:
            self._seen = _seen(weight, clip)
        return same

    def checked(self, codes: Tensor, weight: Tensor, clip: Tensor | None, bits: int) -> Tensor:
        """Return ``codes`` if they belong to a weight and its stored range.

        Raises:
            RuntimeError: they do not; the message names the layer.
        """
        if torch.compiler.is_compiling():  # checked in each run of the compiled code
            made_for = list(self.weight), list(self.clip), self.name
            return _checked_codes(codes, weight.detach(), clip, *made_for, bits)
        if not self.holds(weight, clip):
            raise RuntimeError(
                f"the weight of {self.name or 'the layer'}, or its stored range, has changed since it was "
                f"rounded at {bits} bits: call gradl1_fast.round_weights again, or "
                f"gradl1_fast.clear_rounding(model) to round to nearest"
            )
        return codes


@torch.library.custom_op("gradl1_fast::checked_codes", mutates_args=())
def _checked_codes(
    codes: Tensor,
    weight: Tensor,
    clip: Tensor | None,
    of_weight: list[int],
    of_clip: list[int],
    name: str,
    bits: int,
) -> Tensor:
    return MadeFor(tuple(of_weight), tuple(of_clip), name).checked(codes, weight, clip, bits).clone()


@_checked_codes.register_fake
def _(codes: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(codes)


def _digest(x: Tensor) -> int:
    """Return a 64-bit digest of the values and their positions; minus zero counts as zero."""
    bits = (x.double() + 0.0).contiguous().view(torch.int64).flatten()
    bits = bits ^ (bits >> 32)  # the low bits of narrower types are zero in float64
    factors = torch.arange(1, 2 * _BLOCK, 2, device=x.device) * (_FACTOR - (1 << 64))
    sums = [(block * factors[: len(block)]).sum() for block in bits.split(_BLOCK)]
    result = x.numel()
    for value in torch.stack(sums).tolist() if sums else ():
        result = (result * _FACTOR + value) % (1 << 64)
    return result - (1 << 63)


def _seen(weight: Tensor, clip: Tensor | None) -> tuple[Any, ...] | None:
    tensors = [weight] if clip is None else [weight, clip]
    if any(tensor.is_inference() for tensor in tensors):
        return None  # has no version
    index = torch.linspace(0, weight.numel() - 1, min(weight.numel(), _SAMPLES), dtype=torch.float64)
    index = index.long().to(weight.device)
    return [(weakref.ref(t), t._version) for t in tensors], index, weight.detach().take(index)


def _is_seen(seen: tuple[Any, ...], weight: Tensor, clip: Tensor | None) -> bool:
    before, index, sample = seen
    tensors = [weight] if clip is None else [weight, clip]
    if len(before) != len(tensors):
        return False
    pairs = zip(before, tensors, strict=True)
    if any(reference() is not tensor or version != tensor._version for (reference, version), tensor in pairs):
        return False
    return torch.equal(weight.detach().take(index), sample)  # .data can be changed without a version
