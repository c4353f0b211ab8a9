"""How many operators a step calls, and how many bytes they must at least move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast import backends
from gradl1_fast.backends import reference

__all__ = ["Counted"]

# What allocates without touching memory.
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Counted(TorchDispatchMode):
    """Counts operators, and the bytes of each one's tensors: operands read once, results written once.

    Views count nothing. An operation of this library that the reference computes is counted by what the
    reference calls; by a backend of kernels or loops it is one call.

    Attributes:
        calls: operators that computed or allocated something.
        bytes: read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count."""
        if func.namespace == "gradl1_fast":
            inner = _reference(func, args)
            if inner is not None:
                with self:
                    return inner()
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            self.calls += 1
            if func.overloadpacket.__name__ not in _EMPTY:
                self.bytes += sum(map(_size, _tensors((args, kwargs, result))))
        return result


def _reference(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what computes a registered operator, if it is the reference."""
    name = func.overloadpacket.__name__
    op = next((op for op in backends.OPERATIONS if name.startswith(op + "_")), None)
    if op is None or backends.resolve(op, next(_tensors(args))) is not reference:
        return None
    compute = getattr(reference, name, None)
    has_probe = any(a.name == "probe" for a in func._schema.arguments)
    return compute and (lambda: compute(*(args[: len(func._schema.arguments) - 1] if has_probe else args)))


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _size(t: Tensor) -> int:
    """Return the bytes of a tensor; one that was expanded has fewer than elements."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
