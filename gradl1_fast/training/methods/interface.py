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
    """Return the loss unscaled."""
    return loss


@dataclass(frozen=True)
class Terms:
    """The terms of the objective in a step: detached scalars in units of the unscaled loss.

    Attributes:
        loss: the mini-batch mean loss.
        penalty: the term that the method adds to the loss.
        parts: the parts of the penalty by name, before coefficients; empty without parts.
    """

    loss: Tensor
    penalty: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A method with settings, under the name used in experiments.

    Attributes:
        name: the unique name of the variant.
        text: a short description.
        settings: the settings of the method.
        keeps_recipe: whether to start from the recipe's settings of the penalty, which are those of
            ``gradl1``.
    """

    name: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    keeps_recipe: bool = False


class Family(Enum):
    """The kind of a method, in the order of tables."""

    LOSS = "the loss alone"
    GRADIENTS = "gradients and sharpness"
    WEIGHTS = "distribution of the weights"
    ONE_WIDTH = "quantized at one width in training"
    WIDTHS = "quantized at several widths in training"


_registry: dict[str, type[Method]] = {}


class Method:
    """Base class of training methods: the loss and a term that is added to it, for one converted model.

    A subclass that sets ``name`` is registered. The constructor takes the model and keyword settings and
    changes the model as required (parametrizations, quantizers); parameters that it adds are optimized with
    the others. By default, a step runs one forward pass inside :meth:`during_step` and adds :meth:`added` to
    the loss. A method that runs its own passes overrides :meth:`backward` instead.

    Class attributes:
        name: the name of the method.
        text: a description in a few words.
        source: the paper.
        reconstruction: whether formulas were derived here, because the paper's full text was not available.
        family: see :class:`Family`.
        variants: the variants that experiments run.
        passes: number of forward passes per step.
        second_order: whether gradients of gradients are needed.
        compilable: whether the whole step can be compiled to one graph, because it only uses :meth:`added`.
        distributed: whether gradients may be averaged over ranks and activations recomputed. This requires
            one forward and one backward pass, without changes in between.
        needs_float32: whether autocast would round away the measured quantities.
        widths: pairs ``(w, a)`` that the method trains for; empty without a quantizer in training.

    Attributes:
        model: the model that the method was created for.
        strength: factor of the penalty, initially 1; a warm-up raises it from 0.
        parts: the parts of the last :meth:`added`, see :class:`Terms`.
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
        """Return the term to add to the loss, a scalar with its graph. Sets :attr:`parts`."""
        return loss.new_zeros(())

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """Add the gradient of the objective to each parameter's ``grad``.

        Args:
            closure: runs the forward pass and returns the mini-batch mean loss with its graph. A method that
                calls it several times decides whether the passes use the same random numbers.
            scale: multiplies a loss by a number, such as ``GradScaler.scale``; gradients are scaled by the
                same number.
        """
        with self.during_step():
            loss = closure()
            extra = self.added(loss)
            scale(loss + extra).backward()
        return Terms(loss.detach(), extra.detach(), self.parts)

    def after_step(self) -> None:
        """Called after each optimizer step; may change the model."""

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
        """Return the state, besides that of the model, that resumed training must restore."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"the method {self.name!r} has no state, got {', '.join(state)}")

    def close(self) -> None:
        """Restore an ordinary converted model: remove parametrizations and undo other changes.

        The trained weights are kept, so the model can be evaluated in every regime.
        """


def registered() -> dict[str, type[Method]]:
    """Return the registered classes by name, in the order of families and names."""
    order = list(Family)
    return dict(sorted(_registry.items(), key=lambda item: (order.index(item[1].family), item[0])))


def factor_of(scale: Scale, loss: Tensor) -> Tensor:
    """Return the factor of ``scale``."""
    return scale(torch.ones_like(loss.detach()))
