"""Which tensors are the input of a network: what was marked as such, in whatever shape or order.

Views are recognised by their memory. ``x.permute(0, 2, 3, 1).flatten(1)`` copies, and whether a reshape does
depends on strides that no trace knows; a copy is recognised by its values.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["is_network_input", "mark_input"]

_MODES = torch._C._TorchDispatchModeKey


class _Mark:
    """A tensor that is an input. While it lives, so does the one that it is a view of."""

    def __init__(self, x: Tensor, key: tuple[int, int, int]) -> None:
        self.reference = weakref.ref(x, lambda _: _forget(key, self))
        self.version = x._version
        self._ends: tuple[float, float] | None = None

    @property
    def tensor(self) -> Tensor | None:
        """The tensor, None if it has changed."""
        x = self.reference()
        return x if x is not None and x._version == self.version else None

    def may_be(self, x: Tensor) -> bool:
        """Return whether another tensor could be a copy, as far as can be told without values."""
        own = self.tensor
        if own is None or (own.dtype, own.device) != (x.dtype, x.device):
            return False
        return own.requires_grad or not x.requires_grad  # what depends on parameters is not data

    def has_ends(self, ends: tuple[float, float]) -> bool:
        """Return whether the smallest and the largest value are these."""
        if self._ends is None and (own := self.tensor) is not None:
            self._ends = _ends(own)
        return self._ends == ends

    def has_values_of(self, x: Tensor) -> bool:
        """Return whether another tensor has the same values, in any order."""
        own = self.tensor
        return own is not None and torch.equal(_sorted(own), _sorted(x))


_marks: dict[tuple[int, int, int], _Mark] = {}  # by the values, see _key_of


def mark_input(x: Tensor) -> None:
    """Note that a tensor is the input of a network, so that its site does not count as an activation."""
    if not x.is_inference():
        key = _key_of(x)
        _marks[key] = _Mark(x, key)


def _forget(key: tuple[int, int, int], mark: _Mark) -> None:
    if _marks.get(key) is mark:
        del _marks[key]


def is_network_input(x: Tensor) -> bool:
    """Return whether a tensor has the values of one that was marked, all of them, in any shape and order."""
    if not _marks or x.is_inference():
        return False
    mark = _marks.get(_key_of(x))
    return _is_copy(x) if mark is None else mark.tensor is not None


def _is_copy(x: Tensor) -> bool:
    marks = [mark for key, mark in _marks.items() if key[2] == x.numel() and mark.may_be(x)]
    if not marks or not _is_readable(x):
        return False
    low, high = _ends(x)
    # Values that are all the same, such as those of an empty picture, tell nothing.
    return low < high and any(mark.has_ends((low, high)) and mark.has_values_of(x) for mark in marks)


def _is_readable(x: Tensor) -> bool:
    """Return whether values can be looked at: not under a transform, or while a graph is captured."""
    if not x.is_floating_point() or not x.numel() or x.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if any(torch._C._get_dispatch_mode(key) is not None for key in (_MODES.PROXY, _MODES.FAKE)):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _key_of(x: Tensor) -> tuple[int, int, int]:
    """Return what is the same for a tensor and a view of all of it, in another shape or order of axes."""
    whole = x._base if x._is_view() else x
    return id(whole), int(x.storage_offset()), x.numel()


def _ends(x: Tensor) -> tuple[float, float]:
    low, high = x.detach().aminmax()
    return float(low), float(high)


def _sorted(x: Tensor) -> Tensor:
    return x.detach().flatten().sort().values
