"""Batch-norm folding: merges the normalisation of evaluation mode into the preceding convolution."""

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
from gradl1_fast.nn.second_pass import random_state_kept
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import Forward, call_with, evaluation
from gradl1_fast.quantization.absorption import Absorption, is_batch_norm
from gradl1_fast.quantization.adjacency import Neighbours
from gradl1_fast.quantization.folded import remember_norm
from gradl1_fast.quantization.freshness import forget_weights, is_fresh, remember_weights
from gradl1_fast.quantization.kept import settle_values
from gradl1_fast.quantization.rounding.kept import rescaled
from gradl1_fast.quantization.watching import Watch, tensors_of

__all__ = ["Folding", "fold_batch_norm"]


@dataclass(repr=False)
class Folding(Shown):
    """The result of :func:`fold_batch_norm`; ``print``, or a notebook, shows its batch norms as a table.

    Attributes:
        model: the folded model.
        folded: the convolution that absorbed a batch norm, by the batch norm's name.
        refused: why a batch norm was not folded, by its name.
        without_range: layers whose stored weight range was dropped because it no longer fits.
        without_rounding: layers whose codes of :func:`gradl1_fast.round_weights` were dropped because they no
            longer fit; their weights are rounded to nearest.
        statistics: the use of statistics from :func:`gradl1_fast.reestimate_batch_norm`: ``"in use"`` if
            those of the current widths were folded, for float too; ``"left behind"`` if there were only
            statistics of other widths.
        difference: largest difference between the outputs before and after folding; None if no inputs were
            given.
        scale: largest output before folding; None if no inputs were given.
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
    ``beta + f * (b - mean)``, computed in float64. The model is not changed. The result is a copy of the same
    class:

    - a folded convolution has a new weight and bias;
    - a folded ``nn.BatchNorm*`` is replaced by an ``nn.Identity`` of the same name. A subclass, or a frozen
      batch norm made of buffers, keeps its class with a mean of 0 and a variance of 1, because it may compute
      more, such as an activation;
    - all other modules share their parameters with the model.

    Statistics that were re-estimated for the current widths (:func:`gradl1_fast.reestimate_batch_norm`) are
    folded permanently; those of other widths are dropped.

    The layer before each batch norm is found by tracing. With ``inputs``, a forward pass is observed too, so
    that batch norms of a model that cannot be traced are folded; it is assumed that every pass is the same.

    A batch norm that cannot be folded is left unchanged; a warning and :attr:`Folding.refused` give the
    reason. It cannot be folded if it is in training mode or has no running statistics; if its input is not
    the output of a convolution (as in conv -> ReLU -> BN) or is read elsewhere too; if it or the convolution
    is called in several places; or if the convolution's weight is shared or computed (weight
    standardisation), or the convolution has hooks. After a linear layer, ``inputs`` are needed to check that
    channels match.

    Quantization then applies to the folded weights. With one range per tensor, channels with very different
    ``f`` share it. Stored ranges and codes from :func:`gradl1_fast.round_weights` are scaled if each channel
    has its own range, and dropped otherwise.

    Args:
        model: a converted model, in evaluation mode.
        inputs: inputs of the model; a tuple holds several positional inputs and a mapping keyword arguments.
            The float outputs of both models are compared on them, including all tensors in containers,
            dataclasses and other objects.
        forward: ``forward(model, inputs)`` runs the model, if it is called in another way.

    Raises:
        ValueError: the model has no layers of this library.
        TypeError: the output contains no tensor to compare.

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
    with random_state_kept(), evaluation(model):
        watch.run(lambda: call_with(model, inputs, forward))
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
        fresh = is_fresh(layer) and is_fresh(norm)
        with rescaled(layer) as dropped:
            if not absorption.apply():
                result.without_range.append(name_of_layer)
        if dropped:
            result.without_rounding.append(name_of_layer)
        if fresh:
            remember_weights([layer])
        forget_weights([absorption.rest])  # which may be a copy of the batch norm, with other gammas
        _replace(result.model, norm, absorption.rest)
        result.folded[name] = name_of_layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace every occurrence of a module by another."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    redirect(model, {id(old): new})


def _compare(
    before: nn.Module, after: nn.Module, inputs: Any, forward: Forward | None
) -> tuple[float, float]:
    """Return the largest difference between the outputs, and the largest output."""
    outputs: list[list[Tensor]] = []
    for model in (before, after):
        with random_state_kept(), evaluation(model):
            outputs.append(tensors_of(call_with(model, inputs, forward)))
    if not outputs[0]:
        raise TypeError("fold_batch_norm: the output holds no tensor to compare")
    if [y.shape for y in outputs[0]] != [y.shape for y in outputs[1]]:
        return float("inf"), _largest(outputs[0])
    differences = [_difference(a, b) for a, b in zip(*outputs, strict=True)]
    return _largest(differences), _largest(outputs[0])


def _difference(first: Tensor, second: Tensor) -> Tensor:
    first, second = (y if y.is_complex() else y.double() for y in (first, second))
    same = (first == second) | (first.isnan() & second.isnan())
    return (first - second).masked_fill(same, 0)


def _largest(tensors: list[Tensor]) -> float:
    return max((float(y.abs().max()) for y in tensors if y.numel()), default=0.0)
