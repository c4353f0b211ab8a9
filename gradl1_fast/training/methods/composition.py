"""Combines several methods, such as ``gradl1+kure``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradl1_fast.training.methods.interface import Closure, Family, Method, Scale, Terms, identity

__all__ = ["SEPARATOR", "Composed"]

SEPARATOR = "+"


class Composed(Method):
    """Several methods combined.

    Parametrizations, contexts, added terms and changes after a step are combined. At most one part may run
    its own passes, and at most one may quantize in training. Terms of the other parts are added to the
    objective of the part with its own passes, but not to the loss whose gradient it measures: ``gradl1+kure``
    minimises ``L + lambda ||grad L||_1 + kure(W)``.

    Args:
        model: a converted model.
        parts: the methods, created for this model, in order.

    Raises:
        ValueError: two parts run their own passes or quantize in training.
    """

    family = Family.LOSS

    def __init__(self, model: nn.Module, parts: Sequence[Method]) -> None:
        super().__init__(model)
        self.members = list(parts)
        self.name = SEPARATOR.join(part.name for part in parts)  # type: ignore[misc]
        drivers = [part for part in parts if type(part).backward is not Method.backward]
        quantizing = [part for part in parts if part.widths]
        _at_most_one(self.name, "runs its own passes", drivers)
        _at_most_one(self.name, "quantizes in training", quantizing)
        self._driver = drivers[0] if drivers else None
        self._quantizing = quantizing[0] if quantizing else None
        self.widths = quantizing[0].widths if quantizing else ()
        self.passes = max(part.passes for part in parts)
        self.second_order = any(part.second_order for part in parts)
        self.distributed = all(part.distributed for part in parts) and not drivers
        self.needs_float32 = any(part.needs_float32 for part in parts)

    @contextlib.contextmanager
    def during_step(self) -> Iterator[None]:
        """See :meth:`Method.during_step`: the contexts of all parts but the one with its own passes."""
        with contextlib.ExitStack() as stack:
            for part in self.members:
                part.strength = self.strength
                if part is not self._driver:
                    stack.enter_context(part.during_step())
            yield

    def added(self, loss: Tensor) -> Tensor:
        """See :meth:`Method.added`."""
        total = loss.new_zeros(())
        self.parts = {}
        for part in self.members:
            if part is not self._driver:
                total = total + part.added(loss)
                self.parts = {**self.parts, **{f"{part.name}/{k}": v for k, v in part.parts.items()}}
        return total

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`."""
        if self._driver is None:
            return super().backward(closure, scale)
        with self.during_step():
            terms = self._driver.backward(closure, scale)
            extra = self.added(terms.loss)
            if extra.requires_grad:
                scale(extra).backward()
        return Terms(terms.loss, terms.penalty + extra.detach(), {**terms.parts, **self.parts})

    def after_step(self) -> None:
        """See :meth:`Method.after_step`."""
        for part in self.members:
            part.after_step()

    def quantized(self, w: int | None, a: int | None) -> contextlib.AbstractContextManager[Any]:
        """See :meth:`Method.quantized`."""
        return super().quantized(w, a) if self._quantizing is None else self._quantizing.quantized(w, a)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the states of the parts, each under the name of its method."""
        return {f"{p.name}.{key}": value for p in self.members for key, value in p.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        for part in self.members:
            start = f"{part.name}."
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            part.load_state_dict(own)

    def close(self) -> None:
        """Close the parts, the last one first."""
        for part in reversed(self.members):
            part.close()


def _at_most_one(name: str, what: str, parts: Sequence[Method]) -> None:
    if len(parts) > 1:
        names = " and ".join(part.name for part in parts)
        raise ValueError(f"method {name}: each of {names} {what}; combine at most one such method")
