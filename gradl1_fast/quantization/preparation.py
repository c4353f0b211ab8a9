"""Prepares a trained network for a width in a single call, without training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast._shown import Grid, Shown
from gradl1_fast.conversion.convert import convert
from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization._modes import Forward, call, evaluation, lasting
from gradl1_fast.quantization.bias_correction import correct_bias
from gradl1_fast.quantization.bits import (
    INPUT_BITS,
    Widths,
    bits,
    check_input_bits,
    check_width,
    set_bits,
    width_at,
)
from gradl1_fast.quantization.calibration import calibrate, calibrate_weights, set_per_channel
from gradl1_fast.quantization.kept import forget_width
from gradl1_fast.quantization.ranges.base import Range
from gradl1_fast.quantization.reestimation import reestimate_batch_norm
from gradl1_fast.quantization.rounding.base import RoundingMethod
from gradl1_fast.quantization.rounding.round import round_weights
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["Preparation", "Step", "prepare"]

Criterion = Callable[[nn.Module], float]


AUTO = "auto"
NARROW = 4  # bits up to which rounding beyond nearest pays: docs/before-training.md


@dataclass(frozen=True)
class Step:
    """A step of :func:`prepare`.

    Attributes:
        name: description of the step.
        value: the criterion after this step and all previous ones; None without a criterion.
        taken: whether the step was kept; a step that does not help is undone.
    """

    name: str
    value: float | None = None
    taken: bool = True


@dataclass(repr=False)
class Preparation(Shown):
    """The result of :func:`prepare`; ``print``, or a notebook, shows its steps as a table.

    Attributes:
        model: the prepared network, at the requested widths.
        steps: the steps in order; the first is the original network in float.
        remarks: remarks on the steps, one sentence each.
    """

    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def _parts(self) -> Iterator[Grid | str]:
        if any(step.value is not None for step in self.steps):
            yield Grid(("step", "criterion"), [(step.name, _criterion(step)) for step in self.steps])
        else:
            yield Grid(("step",), [(step.name,) for step in self.steps])
        yield from self.remarks
        yield "the model is at the widths asked for"


def _criterion(step: Step) -> str:
    value = "" if step.value is None else f"{step.value:.4f}"
    return value if step.taken else f"{value} (taken back)"


def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    w: Widths,
    a: Widths,
    criterion: Criterion | None = None,
    higher_is_better: bool = True,
    ranges: str | Range = "mse",
    weight_ranges: str | Range = "mse",
    rounding: str | RoundingMethod | None = AUTO,
    bias_correction: bool | None = None,
    ends: int | None = None,
    input_bits: int | None = INPUT_BITS,
    forward: Forward | None = None,
) -> Preparation:
    """Make a network accurate at a width without training.

    The steps, in order: one weight range per output channel; activation and weight ranges with a small
    squared error, outside of which values are clamped; GPTQ rounding of narrow weights; batch-norm
    statistics for the width; and corrected biases, if there is no batch norm. Each step is also a separate
    function, see the sources below. ``docs/before-training.md`` has measurements of each step.

    The result is a copy that shares the parameters. In float it computes the same as the model, except for
    corrected biases. Ranges are used at every width; statistics and codes are for this width. To add another
    width, call it again with the result: it keeps those of both.

    Args:
        model: a network, converted or not.
        batches: a list of batches without labels, or a loader; gone through several times, in evaluation
            mode. A thousand examples or two.
        w: bits of the weights, as for :func:`gradl1_fast.set_bits`.
        a: bits of the activations, as for :func:`gradl1_fast.set_bits`.
        criterion: takes the model at its widths and returns a number, such as the accuracy on validation
            images. It is evaluated after each step for the report. Statistics and corrected biases that make
            it worse are undone.
        higher_is_better: whether a larger criterion is better.
        ranges: of activations, a name or an object, see :func:`gradl1_fast.calibrate`.
        weight_ranges: of weights, a name or an object, see :func:`gradl1_fast.calibrate_weights`.
        rounding: ``"gptq"``, ``"adaround"`` or an object, see :func:`gradl1_fast.round_weights`; None rounds
            to nearest. ``"auto"`` is ``"gptq"`` if a weight has 4 bits or fewer, and nearest otherwise.
        bias_correction: whether to correct biases, see :func:`gradl1_fast.correct_bias`; they then fit only
            this width. None corrects them if the model has no batch norm.
        ends: minimum bits of the weights and inputs of the first and the last layer; 8 is customary. None
            treats them like other layers.
        input_bits: minimum bits of the network's input, as for :func:`gradl1_fast.set_bits`.
        forward: as for :func:`gradl1_fast.calibrate`.

    Returns:
        The prepared model at the requested widths, and the effect of each step.

    Raises:
        TypeError: ``batches`` is an iterator or a single tensor; a width is not an int or None; or the
            criterion does not return a number.
        ValueError: a width or name is wrong, ``ends`` is given with widths by name, or there is no batch.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> images = [torch.randn(64, 3, 8, 8) for _ in range(4)]
        >>> prepared = gl.prepare(net.eval(), images, w=3, a=4)
        >>> y = prepared.model(images[0])  # at (3, 4)
        >>> for step in prepared.steps:
        ...     print(step.name)
        float
        one range for a tensor, smallest to largest value
        one range for each output channel of a weight
        ranges of activations: mse
        ranges of weights: mse
        rounding: gptq
        batch-norm statistics at the width

    Source: the steps are those of Nagel et al. 2021, arXiv 2106.08295 (a white paper on quantization), and
    Sun et al. 2019, arXiv 1905.07671 (re-estimation).
    """
    batches = lasting("prepare", batches)
    if ends is not None and (isinstance(w, Mapping) or isinstance(a, Mapping)):
        raise ValueError(
            "prepare: ends needs a single width for all weights and a single one for all activations"
        )
    check_width("prepare: ends", ends)
    plan = _Preparing(_copy(model), batches, forward, criterion, higher_is_better)
    plan.widths = _widths(plan.model, batches, forward, w, a, ends, input_bits)
    plan.note("float", at_width=False)
    plan.find_ranges(a, ranges, weight_ranges)
    chosen = _rounding(rounding, plan.widths["w"])
    if chosen is not None:
        plan.round(chosen)
    plan.reestimate()
    plan.correct(bias_correction)
    set_bits(plan.model, **plan.widths)
    return Preparation(plan.model, plan.steps, plan.remarks)


def _copy(model: nn.Module) -> nn.Module:
    """Return a converted copy in evaluation mode and in float."""
    copy = copy_converted(convert(model))
    refuse_sliced(copy, "prepare")
    set_bits(copy.eval(), w=None, a=None)
    return copy


def _rounding(rounding: str | RoundingMethod | None, w: Widths) -> str | RoundingMethod | None:
    """Return how weights at these widths are rounded; None for nearest."""
    widths = [width for width in (w.values() if isinstance(w, Mapping) else [w]) if width is not None]
    if rounding != AUTO:
        return rounding if widths else None
    return "gptq" if widths and min(widths) <= NARROW else None


def _widths(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    w: Widths,
    a: Widths,
    ends: int | None,
    input_bits: int | None,
) -> dict[str, Any]:
    """Return the arguments of ``set_bits``."""
    check_input_bits(a, input_bits)
    if ends is None:
        return {"w": w, "a": a, "input_bits": input_bits}
    assert not isinstance(w, Mapping)
    assert not isinstance(a, Mapping)
    order = _order(model, next(iter(batches)), forward)
    weights: dict[str, int | None] = dict.fromkeys(named_layers(model), w)
    sites = {name: width_at(q, a, input_bits) for name, q in named_quantizers(model).items()}
    of_site = {id(q): name for name, q in named_quantizers(model).items()}
    for name, layer in (order[0], order[-1]) if order else ():
        weights[name] = None if w is None else max(w, ends)
        site = of_site[id(layer.input_quantizer)]
        current = sites[site]
        sites[site] = None if current is None else max(current, ends)
    return {"w": weights, "a": sites}


def _order(model: nn.Module, batch: Any, forward: Forward | None) -> list[tuple[str, QuantizedLayer]]:
    """Return the layers without embeddings, in the order of their first calls."""
    called: dict[str, QuantizedLayer] = {}
    layers = {n: layer for n, layer in named_layers(model).items() if not isinstance(layer, QEmbedding)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, _, name=name: called.setdefault(name, module) and None)
        for name, layer in layers.items()
    ]
    try:
        with evaluation(model):
            call(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called.items())


class _Preparing:
    """The state of a preparation.

    Args:
        model: a converted copy.
        batches: the data.
        forward: see :func:`prepare`.
        criterion: see :func:`prepare`.
        higher_is_better: see :func:`prepare`.

    Attributes:
        widths: the arguments of ``set_bits``.
        steps: the steps so far.
        remarks: the remarks so far.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward | None,
        criterion: Criterion | None,
        higher_is_better: bool,
    ) -> None:
        self.model, self._batches, self._forward = model, batches, forward
        self._criterion, self._sign = criterion, 1.0 if higher_is_better else -1.0
        self.widths: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.remarks: list[str] = []
        self._has_norms = True

    def note(self, name: str, *, at_width: bool = True) -> None:
        """Record a step with the criterion after it."""
        self.steps.append(Step(name, self._value(self.model, at_width)))

    def _value(self, model: nn.Module, at_width: bool = True) -> float | None:
        if self._criterion is None:
            return None
        with bits(model, **(self.widths if at_width else {"w": None, "a": None})):
            return check.number("prepare: criterion", self._criterion(model))

    def find_ranges(self, a: Widths, ranges: str | Range, weight_ranges: str | Range) -> None:
        """Find ranges of weights and activations."""
        with_activations = a is not None
        set_per_channel(self.model, False)
        if with_activations:
            self._calibrate("min_max")
        self._begin_anew()
        self.note("one range for a tensor, smallest to largest value")
        set_per_channel(self.model, True)
        self.note("one range for each output channel of a weight")
        if with_activations:
            self._calibrate(ranges)
            self.note(f"ranges of activations: {_name(ranges)}")
        calibrate_weights(self.model, ranges=weight_ranges)
        self.note(f"ranges of weights: {_name(weight_ranges)}")

    def _begin_anew(self) -> None:
        """Drop the results of an earlier preparation for these widths, which belong to other ranges."""
        with bits(self.model, **self.widths):
            forget_width(self.model)
            for layer in named_layers(self.model).values():
                quantizer = layer.weight_quantizer
                if quantizer.bits is not None:
                    quantizer.set_rounded(quantizer.bits, None)

    def _calibrate(self, ranges: str | Range) -> None:
        calibrate(self.model, self._batches, ranges=ranges, forward=self._forward)

    def round(self, rounding: str | RoundingMethod) -> None:
        """Choose rounded codes for the weights."""
        a = self.widths["a"]
        rounding_report = round_weights(
            self.model, self._batches, w=self.widths["w"], a=a, method=rounding, forward=self._forward
        )
        self.remarks += [
            f"{name}: rounded to nearest: {why}" for name, why in rounding_report.nearest.items()
        ]
        self.note(f"rounding: {_name(rounding)}")

    def reestimate(self) -> None:
        """Re-estimate batch norms at the widths; not in float, whose statistics are shared with the model."""
        if self.widths["w"] is None and self.widths["a"] is None:
            return
        with bits(self.model, **self.widths), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no batch norm")
            reestimation = reestimate_batch_norm(self.model, self._batches, forward=self._forward)
        self.remarks += [f"{name}: statistics left: {why}" for name, why in reestimation.left.items()]
        self._has_norms = bool(reestimation.norms)
        if not self._has_norms:
            self.remarks.append("no batch norm to re-estimate")
        elif not self._helps("batch-norm statistics at the width", self._value(self.model)):
            with bits(self.model, **self.widths):
                forget_width(self.model)

    def correct(self, requested: bool | None) -> None:
        """Correct biases if requested, or, without a batch norm, if it helps."""
        if requested is False or (requested is None and self._has_norms) or self.widths["w"] is None:
            return
        corrected = correct_bias(self.model, self._batches, w=self.widths["w"], forward=self._forward)
        if self._has_norms:
            with bits(corrected, **self.widths):
                reestimate_batch_norm(corrected, self._batches, forward=self._forward)
        if self._helps("bias correction", self._value(corrected), anyway=bool(requested)):
            self.model = corrected

    def _helps(self, name: str, value: float | None, *, anyway: bool = False) -> bool:
        """Record a step; return whether it is kept, which is always so without a criterion."""
        before = next((step.value for step in reversed(self.steps) if step.taken), None)
        helps = value is None or before is None or self._sign * (value - before) >= 0
        self.steps.append(Step(name, value, taken=helps or anyway))
        return helps or anyway


def _name(choice: object) -> str:
    return choice if isinstance(choice, str) else type(choice).__name__
