"""A read-only tensor that replaces a weight stored in another form, and computes its values when it is read.

Some models read the weight of a layer without calling the layer, as in ``F.linear(x, self.qkv.weight)`` or
for an embedding whose table is an input. Some change it, such as RWKV, which rescales its weights for
evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

__all__ = ["METADATA", "ReadOnly", "StandIn"]

# Queries that do not read the values of a tensor.
METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "__len__"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "__hash__", "type"),
}
_OF_MEMORY = {"data_ptr", "storage_offset", "untyped_storage"}


class ReadOnly(Tensor):
    """Values that functions may read but not change, directly or through a view.

    Results computed from them are ordinary tensors.

    Attributes:
        owner: the name of the layer that the weight belongs to.
    """

    owner: str
    __hash__ = object.__hash__

    def _values(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()  # shares the version counter, which detects changes

    def _without_values(self) -> Tensor:
        """Return a tensor of the same shape, type and device."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function on ordinary tensors with these values.

        Raises:
            RuntimeError: the function changes them; the message names the layer.
        """
        values, name = (args, kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" or name in METADATA | _OF_MEMORY:
            args, kwargs = tree_map_only(ReadOnly, lambda t: t._without_values(), values)
            result = super().__torch_function__(func, types, args, kwargs)
            if not isinstance(result, Tensor):
                return result
        return _result(func, name, values)


@_disable_dynamo  # compiled graphs have no tensor versions
def _result(func: Callable[..., Any], name: str, values: tuple[Any, Any]) -> Any:
    read = _Read()
    args, kwargs = tree_map_only(ReadOnly, read.values_of, values)
    result = func(*args, **kwargs)
    read.check(name)
    return tree_map_only(Tensor, read.guarded, result)


class _Read:
    """The values that were passed to a function."""

    def __init__(self) -> None:
        self._read: list[tuple[Tensor, int, str]] = []

    def values_of(self, tensor: ReadOnly) -> Tensor:
        values = tensor._values()
        self._read.append((values, values._version, tensor.owner))
        return values

    def check(self, name: str) -> None:
        """Raise if the function has changed the values."""
        for values, version, owner in self._read:
            if name == "__set__" or values._version != version:
                raise RuntimeError(
                    f"the weight of {owner!r} was read from an any-bit file and is read-only, but {name} "
                    "changes it: run code that changes weights before save_any_bit and before load_any_bit"
                )

    def guarded(self, result: Tensor) -> Tensor:
        """Return the result of a function; a view of the values is read-only too."""
        for values, _, owner in self._read:
            if type(result) is Tensor and _memory(result) == _memory(values):
                view = Tensor._make_subclass(ReadOnly, result)
                view.owner = owner
                return view
        return result


class StandIn(ReadOnly):
    """A tensor with the values of a weight's quantizer at its current width. It occupies one value.

    Code that reads its memory without PyTorch finds NaN.
    """

    quantizer: Any

    @staticmethod
    def of(quantizer: nn.Module | None) -> StandIn:
        """Return a tensor for a quantizer that has ``name``, ``codes`` and ``like``."""
        result = _nan(quantizer).as_subclass(StandIn)
        result.quantizer = quantizer
        return result

    @property
    def owner(self) -> str:  # type: ignore[override]
        """The name of the layer."""
        return self.quantizer.name

    def _values(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.quantizer(None)

    def _without_values(self) -> Tensor:
        return _nan(self.quantizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """Return the tensor for the copy of the quantizer."""
        return StandIn.of(copy.deepcopy(self.quantizer, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the tensor for the quantizer."""
        return StandIn.of, (self.quantizer,)


def _nan(quantizer: Any) -> Tensor:
    return quantizer.like.new_full((), torch.nan).expand(quantizer.codes.shape)


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
