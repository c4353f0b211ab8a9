"""A base class for methods that train one set of weights at several widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast import _checks as check
from gradl1_fast.training.methods.interface import Closure, Scale, Terms, identity
from gradl1_fast.training.methods.quantizing import Quantizing, ends_of, set_ends

__all__ = ["SeveralWidths", "WidthStatistics", "widths_in"]


def widths_in(name: str, widths: str | Sequence[int], widest: int = 8) -> list[int]:
    """Return widths from the widest to the narrowest, from a list or a text such as ``"8 4 2"``.

    Args:
        name: the name of the argument, for messages.
        widths: bits, each from 1 to ``widest``.
        widest: the largest width allowed.

    Raises:
        ValueError: there is no width, or one is out of range or not an integer.
    """
    try:
        bits = sorted({int(each) for each in (widths.split() if isinstance(widths, str) else widths)})
    except ValueError:
        bits = []
    if not bits or bits[0] < 1 or bits[-1] > widest:
        raise ValueError(f"{name} must be widths from 1 to {widest}, as '8 4 2'; got {widths!r}")
    return bits[::-1]


class SeveralWidths(Quantizing):
    """Base class: each step runs a forward and a backward pass per width, from the widest to the narrowest.

    The gradients are added, and the optimizer takes one step. Weights and activations have equal widths. Each
    width has its own activation ranges and batch-norm statistics; the model's statistics are those of the
    widest width. The affine parameters of batch norms are shared. The term ``loss`` is the loss at the widest
    width and ``penalty`` the sum at the others, multiplied by ``strength``.

    Args:
        model: a converted model.
        widths: bits from 1 to 8, a list or a text such as ``"8 4 2"``.
        coefficient: coefficient of the loss at each width but the widest.

    Raises:
        ValueError: a width or the coefficient is out of range, or the model is not converted.
    """

    def __init__(self, model: nn.Module, *, widths: str | Sequence[int], coefficient: float = 1.0) -> None:
        name = type(self).__name__
        bits = widths_in(f"{name}: widths", widths)
        self.coefficient = check.coefficient(f"{name}: coefficient", coefficient)
        super().__init__(model, [(b, b) for b in bits])
        self.passes = len(bits)
        self.statistics = WidthStatistics(model)
        self._ranges_at = {
            b: self.ranges
            if b == bits[0]
            else {name: self.range_for(name, r.quantizer) for name, r in self.ranges.items()}
            for b in bits
        }

    def during_step(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: :meth:`backward` chooses the widths."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def quantized(self, w: int | None, a: int | None) -> Iterator[None]:
        """See :meth:`Method.quantized`; with the ranges and batch-norm statistics of the width."""
        self.ranges = self._ranges_at.get(w or 0, self.ranges)
        with super().quantized(w, a), self.statistics.of(None if (w, a) == self.widths[0] else w):
            yield

    def loss_at(self, index: int, closure: Closure) -> Tensor:
        """Return the loss of a pass at one width, with its graph; ``index`` counts :attr:`widths`."""
        return closure()

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. The closure is called once for each width."""
        losses = []
        for index, (w, a) in enumerate(self.widths):
            factor = self.strength * self.coefficient if index else 1.0
            with self.quantized(w, a):
                loss = self.loss_at(index, closure)
                scale(factor * loss).backward()
            losses.append(factor * loss.detach())
        parts = {f"loss at {width}": loss for width, loss in zip(self.widths, losses, strict=True)}
        return Terms(losses[0], torch.stack([loss.new_zeros(()), *losses[1:]]).sum(), parts)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ranges and batch-norm statistics of all widths."""
        ends = {f"{b}.{k}": v for b, ranges in self._ranges_at.items() for k, v in ends_of(ranges).items()}
        return {**ends, **self.statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        for b, ranges in self._ranges_at.items():
            set_ends(ranges, state, f"{b}.")
        self.statistics.load_state_dict(state)


class WidthStatistics:
    """Running statistics of the batch norms of a model, one set per width.

    Args:
        model: a model with any number of batch norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {
            f"{name}.{key}": buffer
            for name, norm in model.named_modules()
            if isinstance(norm, _BatchNorm)
            for key, buffer in norm.named_buffers()
        }
        self._by_width: dict[int, dict[str, Tensor]] = {}

    @contextlib.contextmanager
    def of(self, width: int | None) -> Iterator[None]:
        """Use and update the statistics of a width inside the block; None uses those of the model.

        A new width is initialized with the model's statistics.
        """
        if width is None:
            yield
            return
        before = self._values()
        self._put(self._by_width.get(width, before))
        try:
            yield
        finally:
            self._by_width[width] = self._values()
            self._put(before)

    def _values(self) -> dict[str, Tensor]:
        return {key: buffer.clone() for key, buffer in self._buffers.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, buffer in self._buffers.items():
            buffer.copy_(values[key])

    def state_dict(self) -> dict[str, Tensor]:
        """Return all statistics by ``norm.<width>.<name>``."""
        return {f"norm.{w}.{key}": v for w, values in self._by_width.items() for key, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        self._by_width = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            width, _, name = rest.partition(".")
            if kind == "norm" and name in self._buffers:
                self._by_width.setdefault(int(width), {})[name] = value.clone()
