"""The interface of a training method, declared on its class, and the registry of the classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = [
    "Closure",
    "Family",
    "Method",
    "Scale",
    "Terms",
    "Variant",
    "Width",
    "factor_of",
    "identity",
    "registered",
]

Closure = Callable[[], Tensor]
Scale = Callable[[Tensor], Tensor]
Width = tuple[int | None, int | None]


def identity(loss: Tensor) -> Tensor:
    """Return the loss as it is: no scaling."""
    return loss


@dataclass(frozen=True)
class Terms:
    """What one step was trained on: scalars without graph, in units of the loss, whatever its scaling.

    Attributes:
        loss: the mini-batch mean loss.
        penalty: what the method adds to it.
        parts: what the penalty is made of, by name and before coefficients, where it has parts.
    """

    loss: Tensor
    penalty: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A method with settings, under the name that an experiment prints.

    Attributes:
        name: of the variant, in no other method.
        text: what it does, for a reader.
        settings: of the method.
        keeps_recipe: whether the settings of the recipe's penalty, which are those of ``gradl1``, come first.
    """

    name: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    keeps_recipe: bool = False


class Family(Enum):
    """What a method works on; the order is that of tables."""

    LOSS = "the loss alone"
    GRADIENTS = "gradients and sharpness"
    WEIGHTS = "distribution of the weights"
    ONE_WIDTH = "quantized at one width in training"
    WIDTHS = "quantized at several widths in training"


_registry: dict[str, type[Method]] = {}


class Method:
    """How a network is trained: the loss, and what the method adds to it. Made for one converted model.

    A subclass that sets ``name`` is registered. The constructor takes the model and keyword settings and
    changes the model as the method needs it (parametrizations, quantizers); parameters that it adds to the
    model are optimized with the others. The default implementation runs one forward pass inside
    :meth:`during_step` and adds :meth:`added` to the loss. A method that runs its own passes overrides
    :meth:`backward` instead.

    Class attributes:
        name: of the method.
        text: what it does, in a few words.
        source: paper.
        reconstruction: whether formulas were derived here, because the paper's full text was not available.
        family: see :class:`Family`.
        variants: what an experiment runs.
        passes: forward passes in a step.
        second_order: whether gradients of gradients are needed.
        compilable: whether the whole step is one graph: :meth:`added` is all there is.
        distributed: whether gradients may be averaged over ranks and activations computed again: one forward
            pass and one backward pass, and nothing else changes between the two.
        needs_float32: whether autocast would round away what the method measures.
        widths: pairs ``(w, a)`` that the method trains for; empty where there is no quantizer in training.

    Attributes:
        model: the model it was made for.
        strength: factor of the penalty, 1 at first; a warm-up raises it from 0.
        parts: what the last :meth:`added` was made of, see :class:`Terms`.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    source: ClassVar[str] = ""
    reconstruction: ClassVar[bool] = False
    family: ClassVar[Family]
    variants: ClassVar[tuple[Variant, ...]] = ()
    passes: int = 1
    second_order: bool = False
    compilable: bool = False
    distributed: bool = True
    needs_float32: bool = False
    widths: tuple[Width, ...] = ()

    strength: float
    parts: Mapping[str, Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is not None:
            if name in _registry:
                raise TypeError(
                    f"{cls.__qualname__}: the method {name!r} is {_registry[name].__qualname__} already"
                )
            _registry[name] = cls

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.strength = 1.0
        self.parts = {}

    @classmethod
    def needs_second_order(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether the method needs gradients of gradients with these settings."""
        return cls.second_order

    def during_step(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for the forward and backward passes of a step, such as one that quantizes."""
        return contextlib.nullcontext()

    def added(self, loss: Tensor) -> Tensor:
        """Return what is added to the loss of a forward pass: a scalar with its graph. Sets :attr:`parts`."""
        return loss.new_zeros(())

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """Add the gradient of the whole objective to each parameter's ``grad``.

        Args:
            closure: runs the forward pass and returns the mini-batch mean loss with its graph. A method that
                calls it several times decides whether the passes see the same random numbers.
            scale: multiplies a loss by a number, such as ``GradScaler.scale`` does; gradients are
                multiplied alike.
        """
        with self.during_step():
            loss = closure()
            extra = self.added(loss)
            scale(loss + extra).backward()
        return Terms(loss.detach(), extra.detach(), self.parts)

    def after_step(self) -> None:
        """Change the model after each step of the optimizer, or do nothing."""

    def quantized(self, w: int | None, a: int | None) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model computes with the method's own quantizer.

        Args:
            w: bits of the weights.
            a: bits of the activations; ``(w, a)`` is one of :attr:`widths`.

        Raises:
            ValueError: the method has no quantizer of its own, or none of this width.
        """
        known = ", ".join(map(str, self.widths)) or "none: it has no quantizer of its own"
        raise ValueError(f"{self.name}: (w, a) must be one of {known}; got ({w}, {a})")

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a training that resumes must restore beside the model's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"the method {self.name!r} has no state, got {', '.join(state)}")

    def close(self) -> None:
        """Leave an ordinary converted model: remove parametrizations and restore what else was changed.

        The weights are those that the method trained, so the model can be evaluated in every regime.
        """


def registered() -> dict[str, type[Method]]:
    """Return the registered classes by name, in the order of families and names."""
    order = list(Family)
    return dict(sorted(_registry.items(), key=lambda item: (order.index(item[1].family), item[0])))


def factor_of(scale: Scale, loss: Tensor) -> Tensor:
    """Return the number by which ``scale`` multiplies."""
    return scale(torch.ones_like(loss.detach()))
