"""Batch-norm folding: the normalisation of evaluation mode becomes part of the convolution before it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradl1_fast._shown import Grid, Shown
from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.references import redirect
from gradl1_fast.nn.second_pass import RandomState
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import Forward, call_with, evaluation
from gradl1_fast.quantization.absorption import Absorption, is_batch_norm
from gradl1_fast.quantization.adjacency import Neighbours
from gradl1_fast.quantization.folded import remember_norm
from gradl1_fast.quantization.freshness import is_fresh, remember_weights
from gradl1_fast.quantization.kept import settle_values
from gradl1_fast.quantization.rounding.kept import rescaled
from gradl1_fast.quantization.watching import Watch, tensors_of

__all__ = ["Folding", "fold_batch_norm"]


@dataclass(repr=False)
class Folding(Shown):
    """The result of :func:`fold_batch_norm`; ``print``, or a notebook, shows its batch norms as a table.

    Attributes:
        model: the folded model.
        folded: the convolution that took a batch norm in, by the batch norm's name.
        refused: why a batch norm stays, by its name.
        without_range: layers whose stored weight range no longer fits, and was dropped.
        without_rounding: layers whose codes of :func:`gradl1_fast.round_weights` no longer fit: they are
            rounded to nearest.
        statistics: of batch norms that :func:`gradl1_fast.reestimate_batch_norm` found: ``"in use"`` if those
            of the present widths were folded in, for float too; ``"left behind"`` if there were others only.
        difference: largest difference between the outputs before and after, and ``scale`` the largest
            output before; None if no inputs were given.
        scale: see ``difference``.
    """

    model: nn.Module
    folded: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    without_range: list[str] = field(default_factory=list)
    without_rounding: list[str] = field(default_factory=list)
    statistics: str = ""
    difference: float | None = None
    scale: float | None = None

    def _parts(self) -> Iterator[Grid | str]:
        rows = [(bn, f"folded into {conv}") for bn, conv in self.folded.items()]
        rows += [(bn, f"not folded: {reason}") for bn, reason in self.refused.items()]
        rows += [(name, "its stored weight range was dropped") for name in self.without_range]
        rows += [(name, "rounded to nearest again") for name in self.without_rounding]
        if rows:
            yield Grid(("name", "result"), rows)
        elif not self.statistics and self.difference is None:
            yield "no batch norm"
        if self.statistics:
            yield f"re-estimated statistics: {self.statistics}"
        if self.difference is not None:
            yield f"largest output difference: {self.difference:.3g} (largest output {self.scale:.3g})"


def fold_batch_norm(model: nn.Module, inputs: Any = None, *, forward: Forward | None = None) -> Folding:
    """Fold each batch norm into the layer before it, for evaluation and export.

    With ``f = gamma / sqrt(var + eps)``, the layer's weight becomes ``f * W`` and its bias
    ``beta + f * (b - mean)``, computed in float64. The model stays as it is; the result is a copy of the same
    class:

    - a folded convolution has a weight and a bias of its own;
    - a folded ``nn.BatchNorm*`` is replaced, under its name, by an ``nn.Identity``; a subclass, or a frozen
      batch norm made of buffers, keeps its class and gets a mean of 0 and a variance of 1, so that what else
      it does, such as an activation, stays;
    - everything else shares its parameters with the model.

    Statistics that were re-estimated for the present widths (:func:`gradl1_fast.reestimate_batch_norm`) are
    folded in permanently; those of other widths are not carried over.

    Traced graphs show which layer feeds which. With ``inputs``, one forward pass is observed as well, so that
    batch norms of a model that cannot be traced are folded too; it is assumed that every pass does the same.

    A batch norm that cannot be folded stays, and a warning and :attr:`Folding.refused` say why. That is
    one in training mode or without running statistics, one whose input is not the output of a
    convolution (as in conv -> ReLU -> BN) or is read elsewhere too, one called or with a convolution
    called in several places, with a weight that another layer shares or that is computed (weight
    standardisation), or with hooks. Behind a linear layer it takes ``inputs`` to see that channels match.

    The weights that are quantized are then those of the folded convolutions: with one range for a
    tensor, channels of very different ``f`` share it. A stored range is scaled where each channel has
    one, and dropped otherwise; so are codes from :func:`gradl1_fast.round_weights`.

    Args:
        model: a converted model, in evaluation mode.
        inputs: what the model is called with, a tuple being several inputs in order and a mapping keyword
            arguments. The outputs of both models, in float, are compared on them: all tensors in containers,
            dataclasses and other objects.
        forward: ``forward(model, inputs)`` runs the model in any other way.

    Raises:
        ValueError: the model has no layers of this library.
        TypeError: the output to be compared holds no tensor.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> plain = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU())
        >>> folding = gl.fold_batch_norm(gl.convert(plain).eval(), torch.randn(4, 1, 6, 6))
        >>> folding.model
        Sequential(
          (0): QConv2d(...)
          (1): Identity()
          (2): ReLU()
        )
    """
    if not any(isinstance(m, QuantizedLayer) for m in model.modules()):
        raise ValueError("fold_batch_norm: the model is not converted: call gradl1_fast.convert(model) first")
    model = copy_converted(model)
    statistics = settle_values(model)
    result = Folding(copy_converted(model), statistics=statistics)
    if statistics == "left behind":
        warnings.warn(
            "fold_batch_norm: statistics re-estimated for widths other than the current ones are left "
            "behind: fold at the width, or call reestimate_batch_norm on the folded model",
            stacklevel=2,
        )
    watch = None if inputs is None else _watched(result.model, inputs, forward)
    neighbours = Neighbours(result.model, watch)
    result.refused = neighbours.refused
    _fold(result, neighbours)
    if result.refused:
        reasons = "; ".join(f"{name} {reason}" for name, reason in result.refused.items())
        warnings.warn(f"fold_batch_norm: not folded: {reasons}", stacklevel=2)
    if inputs is not None:
        result.difference, result.scale = _compare(model, result.model, inputs, forward)
    return result


def _watched(model: nn.Module, inputs: Any, forward: Forward | None) -> Watch:
    norms = [m for m in model.modules() if is_batch_norm(m)]
    watch = Watch(named_layers(model).values(), norms)
    randomness = RandomState()
    with evaluation(model):
        watch.run(lambda: call_with(model, inputs, forward))
    randomness.replay()
    return watch


def _fold(result: Folding, neighbours: Neighbours) -> None:
    names = {id(m): name for name, m in result.model.named_modules()}
    for norm, layer in neighbours.pairs:
        name, name_of_layer = names[id(norm)], names[id(layer)]
        absorption = Absorption(norm, layer)
        reason = absorption.reason_against()
        if reason is None and not layer.twin.__module__.startswith("torch.nn") and not absorption.applies():
            reason = f"follows {name_of_layer}, which has no bias in its forward pass"
        if reason is not None:
            result.refused[name] = reason
            continue
        remember_norm(layer, norm)
        fresh = is_fresh(layer)
        with rescaled(layer) as dropped:
            if not absorption.apply():
                result.without_range.append(name_of_layer)
        if dropped:
            result.without_rounding.append(name_of_layer)
        if fresh:
            remember_weights([layer])
        _replace(result.model, norm, absorption.rest)
        result.folded[name] = name_of_layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that stands."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    redirect(model, {id(old): new})


def _compare(
    before: nn.Module, after: nn.Module, inputs: Any, forward: Forward | None
) -> tuple[float, float]:
    """Return the largest difference of the outputs, and the largest output."""
    randomness = RandomState()
    outputs: list[list[Tensor]] = []
    for model in (before, after):
        randomness.replay()
        with evaluation(model):
            outputs.append(tensors_of(call_with(model, inputs, forward)))
    if not outputs[0]:
        raise TypeError("fold_batch_norm: the output holds no tensor to compare")
    if [y.shape for y in outputs[0]] != [y.shape for y in outputs[1]]:
        return float("inf"), _largest(outputs[0])
    differences = [_difference(a, b) for a, b in zip(*outputs, strict=True)]
    return _largest(differences), _largest(outputs[0])


def _difference(one: Tensor, other: Tensor) -> Tensor:
    one, other = (y if y.is_complex() else y.double() for y in (one, other))
    same = (one == other) | (one.isnan() & other.isnan())
    return (one - other).masked_fill(same, 0)


def _largest(tensors: list[Tensor]) -> float:
    return max((float(y.abs().max()) for y in tensors if y.numel()), default=0.0)
