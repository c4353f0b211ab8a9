"""Recognises the input of a network, also in another shape or order.

Views are recognised by their memory and copies by their values. ``x.permute(0, 2, 3, 1).flatten(1)`` copies,
and whether a reshape copies depends on strides, which a trace does not know.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["is_network_input", "mark_input"]

_MODES = torch._C._TorchDispatchModeKey


class _Mark:
    """A tensor that was marked as an input, held by a weak reference."""

    def __init__(self, x: Tensor, key: tuple[int, int, int]) -> None:
        self.reference = weakref.ref(x, lambda _: _forget(key, self))
        self.version = x._version
        self._ends: tuple[float, float] | None = None

    @property
    def tensor(self) -> Tensor | None:
        """The tensor; None if it was changed or freed."""
        x = self.reference()
        return x if x is not None and x._version == self.version else None

    def may_be(self, x: Tensor) -> bool:
        """Return whether another tensor could be a copy, judged without reading values."""
        marked = self.tensor
        if marked is None or (marked.dtype, marked.device) != (x.dtype, x.device):
            return False
        return marked.requires_grad or not x.requires_grad  # a tensor that depends on parameters is not data

    def has_ends(self, ends: tuple[float, float]) -> bool:
        """Return whether ``ends`` are the smallest and the largest value."""
        if self._ends is None and (marked := self.tensor) is not None:
            self._ends = _ends(marked)
        return self._ends == ends

    def has_values_of(self, x: Tensor) -> bool:
        """Return whether another tensor has the same values in any order."""
        marked = self.tensor
        return marked is not None and torch.equal(_sorted(marked), _sorted(x))


_marks: dict[tuple[int, int, int], _Mark] = {}  # by _key_of


def mark_input(x: Tensor) -> None:
    """Mark a tensor as the input of a network, so that its site does not count as an activation."""
    if not x.is_inference():
        key = _key_of(x)
        _marks[key] = _Mark(x, key)


def _forget(key: tuple[int, int, int], mark: _Mark) -> None:
    if _marks.get(key) is mark:
        del _marks[key]


def is_network_input(x: Tensor) -> bool:
    """Return whether a tensor has all values of a marked tensor, in any shape and order."""
    if not _marks or x.is_inference():
        return False
    mark = _marks.get(_key_of(x))
    return _is_copy(x) if mark is None else mark.tensor is not None


def _is_copy(x: Tensor) -> bool:
    marks = [mark for key, mark in _marks.items() if key[2] == x.numel() and mark.may_be(x)]
    if not marks or not _is_readable(x):
        return False
    low, high = _ends(x)
    # A constant tensor, such as a blank image, cannot be recognised by its values.
    return low < high and any(mark.has_ends((low, high)) and mark.has_values_of(x) for mark in marks)


def _is_readable(x: Tensor) -> bool:
    """Return whether values can be read: not under a transform or while a CUDA graph is captured."""
    if not x.is_floating_point() or not x.numel() or x.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if any(torch._C._get_dispatch_mode(key) is not None for key in (_MODES.PROXY, _MODES.FAKE)):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _key_of(x: Tensor) -> tuple[int, int, int]:
    """Return a key that a tensor shares with its views of all values, in any shape or order of axes."""
    base = x._base if x._is_view() else x
    return id(base), int(x.storage_offset()), x.numel()


def _ends(x: Tensor) -> tuple[float, float]:
    low, high = x.detach().aminmax()
    return float(low), float(high)


def _sorted(x: Tensor) -> Tensor:
    return x.detach().flatten().sort().values
