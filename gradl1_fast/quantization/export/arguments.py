"""The inputs of a model: a tensor, a tuple of arguments or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["Arguments"]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> Arguments:
        """Return the arguments for a batch.

        Raises:
            TypeError: ``inputs`` is of another type.
        """
        if isinstance(inputs, Arguments):
            return inputs
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        if isinstance(inputs, tuple | list):
            return cls(tuple(inputs), {})
        raise TypeError(
            "inputs must be a tensor, a tuple of arguments or a mapping of keyword arguments, "
            f"got {type(inputs).__name__}"
        )

    def call(self, function: Any) -> Any:
        """Call a model or function with the arguments."""
        return function(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int:
        """The size of the batch: the first dimension of the first tensor; 1 without one."""
        return next((len(x) for x in self.tensors if x.dim()), 1)

    def rows(self, start: int, stop: int) -> Arguments:
        """Return some examples of the batch; tensors of another first dimension are not sliced."""
        size = self.size

        def cut(x: Tensor) -> Tensor:
            return x[start:stop] if x.dim() and len(x) == size else x

        return Arguments(*tree_map_only(Tensor, cut, (self.args, self.kwargs)))

    def split(self, count: int) -> Iterator[Arguments]:
        """Yield the batch in parts of ``count`` examples."""
        for start in range(0, self.size, count):
            yield self.rows(start, start + count)

    def example(self) -> Arguments:
        """Return a batch of two, because ``torch.export`` treats a dimension of one as fixed."""
        if self.size > 1:
            return self.rows(0, 2)

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, x]) if x.dim() and len(x) == 1 else x

        return Arguments(*tree_map_only(Tensor, twice, (self.args, self.kwargs)))

    def dynamic(self, batch: bool, sizes: bool) -> tuple[Any, ...] | None:
        """Return the ``dynamic_shapes`` of ``torch.export`` for positional and keyword arguments.

        Args:
            batch: whether the batch dimension is dynamic, the first dimension of tensors of the batch's size.
            sizes: whether height and width are dynamic, the last dimensions of tensors with four or more.
        """
        size, name = self.size, torch.export.Dim("batch")

        def shape(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return None
            free: dict[int, Any] = {}
            if batch and x.dim() and len(x) == size:
                free[0] = name
            if sizes and x.dim() > 3:
                free |= dict.fromkeys((x.dim() - 2, x.dim() - 1), torch.export.Dim.DYNAMIC)
            return free or None

        return tree_map(shape, (self.args, self.kwargs))
