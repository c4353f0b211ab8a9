"""Rounding of weights with codes chosen to minimise the change of layer outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._progress import track
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import Forward
from gradl1_fast.quantization.bits import Widths, bits, widths_of
from gradl1_fast.quantization.rounding.base import Problem, RoundingMethod
from gradl1_fast.quantization.rounding.choice import choose
from gradl1_fast.quantization.rounding.collect import Data
from gradl1_fast.quantization.rounding.kept import drop_rounding
from gradl1_fast.quantization.rounding.report import Rounding, RoundingRow
from gradl1_fast.quantization.rounding.second_moments import SecondMoments
from gradl1_fast.quantization.rounding.weights import Rows, reason_against, tied
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["clear_rounding", "round_weights"]


def round_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    w: Widths,
    a: Widths = None,
    method: str | RoundingMethod = "gptq",
    forward: Forward | None = None,
) -> Rounding:
    """Choose and store codes of the weights at a width that change layer outputs less than nearest rounding.

    Rounding to nearest minimises the error of each weight, but the error that matters is that of ``W x``. It
    depends on the second moments of the layer's inputs, which are measured on unlabelled data. The grid of
    each weight does not change: it is that of its own range, or of the range stored by
    :func:`gradl1_fast.calibrate_weights`, which should be called first.

    The codes are used whenever the weight is at this width: in evaluation, sweeps, training (with the
    straight-through gradient of nearest rounding) and export. Other widths are not affected; call this once
    for each. The codes belong to the current weights and ranges; if one changes, using the codes raises.
    :func:`gradl1_fast.save_ranges` saves them. :func:`clear_rounding` and a new call for the same width
    remove them. Rounding changes the statistics of the following batch norms: call
    :func:`gradl1_fast.reestimate_batch_norm` afterwards.

    Embeddings, transposed convolutions and layers that no batch reaches are rounded to nearest; the result
    names them. Layers that share a weight on the same grid share the codes. The error of each output channel
    is at most that of the nearest codes.

    Args:
        model: a converted model, in any mode. It is changed in place.
        batches: as for :func:`gradl1_fast.calibrate`, one or two thousand examples without labels.
        w: bits of the weights, as for :func:`gradl1_fast.set_bits`. Layers in float are skipped.
        a: bits of the layers' inputs, as for :func:`gradl1_fast.set_bits`, so that codes compensate for their
            errors too; None for float.
        method: ``"gptq"`` (closed form, seconds per layer), ``"adaround"`` (minutes per network, usually
            better), or an object of :mod:`gradl1_fast.rounding` with options.
        forward: as for :func:`gradl1_fast.calibrate`.

    Returns:
        The error of each layer's output before and after.

    Raises:
        ValueError: the model has no layers of this library or was loaded from an any-bit file, there is no
            batch, a width or name is wrong, or the data hold NaN or infinity; the message names the layer.
            The codes are then unchanged.
        TypeError: a width is not an int or None, ``method`` is neither a name nor an object of
            :mod:`gradl1_fast.rounding`, or ``batches`` is a single tensor or mapping.
        RuntimeError: ``a`` is given and needed, and an activation has no range yet.

    Source: Frantar et al. 2022, arXiv 2210.17323; Nagel et al. 2020, arXiv 2004.10568.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
        >>> model = gl.convert(torch.nn.Sequential(*layers), per_channel=True)
        >>> batches = [torch.randn(64, 16) @ torch.randn(16, 16)]
        >>> rounding = gl.round_weights(model, batches, w=3)
        >>> all(row.chosen <= row.nearest for row in rounding.rows)
        True
        >>> with gl.bits(model, w=3, a=None):
        ...     y = model(batches[0])  # with these codes
    """
    refuse_sliced(model, "round_weights")
    chosen = choose("round_weights", method)
    if not named_layers(model):
        raise ValueError("round_weights: the model is not converted: call gradl1_fast.convert(model) first")
    with bits(model, w=w, a={}):
        widths = {name: width for name, width in widths_of(model)[0].items() if width is not None}
    layers = {name: layer for name, layer in named_layers(model).items() if name in widths}
    reasons = {name: reason_against(layer) for name, layer in layers.items()}
    rounder = _Rounder({n: layer for n, layer in layers.items() if reasons[n] is None}, widths, chosen)
    with _codes_back_on_error(layers), torch.no_grad():
        rows = rounder.round(Data(model, batches, forward, widths, a))
    reasons |= dict.fromkeys(rounder.missing(), "no value reached it")
    return Rounding(rows, {name: reason for name, reason in reasons.items() if reason is not None})


def clear_rounding(model: nn.Module, *, w: int | None = None) -> None:
    """Remove stored codes, at one width or at all widths; weights are then rounded to nearest.

    Args:
        model: a converted model; changed in place.
        w: the width; None for all widths.
    """
    for layer in named_layers(model).values():
        if w is None:
            drop_rounding(layer)
        else:
            layer.weight_quantizer.set_rounded(w, None)


class _Rounder:
    """Rounds layers; layers that share a weight are rounded together.

    Args:
        layers: the layers, by name.
        widths: the widths of their weights.
        method: the method that chooses the codes.
    """

    def __init__(
        self, layers: Mapping[str, QuantizedLayer], widths: Mapping[str, int], method: RoundingMethod
    ) -> None:
        self._layers, self._widths, self._method = layers, widths, method

    def round(self, data: Data) -> list[RoundingRow]:
        """Store codes for each layer that a value reaches; return a row per weight."""
        for name, layer in self._layers.items():
            layer.weight_quantizer.set_rounded(self._widths[name], None)
        groups = tied(self._layers, self._widths)
        in_float = data.in_float(self._layers) if self._method.inputs == "float" else {}
        order = in_float or data.reached(self._layers)
        rows = []
        for names in track(dict.fromkeys(groups[name] for name in order), "round_weights"):
            if self._method.inputs != "float":
                shared = {name: self._layers[name] for name in names}
                moments = data.as_rounded(shared, renormalise=self._method.inputs == "renormalised")
            else:
                moments = SecondMoments.sum([in_float[name] for name in names if name in in_float])
            rows.append(self._round(names, moments))
        return rows

    def missing(self) -> list[str]:
        """Return the names of layers without codes."""
        return [n for n, q in self._layers.items() if self._widths[n] not in q.weight_quantizer.rounded]

    def _round(self, names: Sequence[str], moments: SecondMoments) -> RoundingRow:
        first = names[0]
        rows = Rows(self._layers[first], self._widths[first])
        problem = rows.problem(moments)
        if not all(bool(t.isfinite().all()) for t in (problem.weight, problem.moments)):
            raise ValueError(f"round_weights: the input or the weight of {first!r} holds NaN or infinity")
        nearest = rows.nearest(problem)
        codes = problem.better(self._method.codes(problem), nearest)
        for name in names:
            Rows(self._layers[name], self._widths[name]).store(codes, name)
        return RoundingRow(first, self._widths[first], *_relative(problem, nearest, codes))


def _relative(problem: Problem, nearest: Tensor, codes: Tensor) -> tuple[float, float]:
    """Return the errors of the nearest and of other codes, divided by the mean square of the output."""
    power = float(problem.power().sum())
    before, after = (float(problem.errors(each).sum()) for each in (nearest, codes))
    return (before / power, after / power) if power else (0.0, 0.0)


@contextlib.contextmanager
def _codes_back_on_error(layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    quantizers = {name: layer.weight_quantizer for name, layer in layers.items()}
    before = {n: [(b, codes, q.made_for(b)) for b, codes in q.rounded.items()] for n, q in quantizers.items()}
    try:
        yield
    except BaseException:
        for name, layer in layers.items():
            drop_rounding(layer)
            for stored in before[name]:
                quantizers[name].set_rounded(*stored)
        raise
