"""The common input of all formats: the model with folded batch norms at the widths to export."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.adjacency import NEEDS_INPUTS
from gradl1_fast.quantization.bits import Widths, bits, check_width, set_bits, widths_of
from gradl1_fast.quantization.calibration import observed
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.integers import prevent_overflow
from gradl1_fast.quantization.folding import Folding, fold_batch_norm
from gradl1_fast.quantization.freshness import warn_if_stale
from gradl1_fast.quantization.kept import kept_values
from gradl1_fast.quantization.sliced import SlicedWeight

__all__ = ["NotExportableError", "Prepared", "simulate"]


class NotExportableError(ValueError):
    """A part of the model cannot be exported; the message names it."""


@dataclass(frozen=True)
class Prepared:
    """A model to export, which is also the simulation that the exported file must agree with.

    Attributes:
        model: the folded model at its widths, in evaluation mode.
        folding: the result of batch-norm folding.
        w: bits of each weight by layer, None for float.
        a: bits of each activation by site, None for float.
        raised: by layer, the number of channels whose weight scale was raised so that biases fit 32 bits.
    """

    model: nn.Module
    folding: Folding
    w: dict[str, int | None]
    a: dict[str, int | None]
    raised: dict[str, int] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """Return a sentence for each batch norm that was not folded and each layer with raised scales."""
        remarks = [f"{name} {reason}: not folded" for name, reason in self.folding.refused.items()]
        for name in self.folding.without_rounding:
            remarks.append(f"{name}: folding changed its grid; its weight is rounded to nearest")
        for name, count in self.raised.items():
            remarks.append(f"{name}: {count} weight scale(s) raised so that the bias fits in 32 bits")
        return remarks

    def widths(self) -> str:
        """Return the widths in short form, such as ``w4 a8``."""
        return f"w{_one(self.w)} a{_one(self.a)}"


def simulate(
    model: nn.Module, inputs: Any, *, w: Widths = None, a: Widths = None, input_bits: int | None = 8
) -> Prepared:
    """Return the simulation of an exported model: a copy with folded batch norms at the given widths.

    Args:
        model: a converted model in evaluation mode, in float32, calibrated if ``a`` is given. It is not
            changed.
        inputs: a batch: a tensor, a tuple of arguments or a mapping of keyword arguments.
        w: bits of the weights, 1 to 8 or 16, or None for float; or a mapping by layer, as for
            :func:`gradl1_fast.set_bits`. If ``w`` and ``a`` are both None, the current widths of the model.
        a: bits of the activations, a number or a mapping by site.
        input_bits: minimum bits of the network's input, as for :func:`gradl1_fast.set_bits`.

    Raises:
        NotExportableError: the model is in training mode, in another type, or has no layers or no weights.
        RuntimeError: an activation has no range yet.
        TypeError: a width is not an int or None.
        ValueError: a width is out of range.
    """
    _check_model(model)
    arguments = Arguments.of(inputs)
    with _statistics_at(model, w, a, input_bits):
        folding = _folded(model, None)
        _find_sites(folding.model, arguments)
        if any(NEEDS_INPUTS in reason for reason in folding.refused.values()):
            folding = _folded(model, arguments)
            _find_sites(folding.model, arguments)
    _set_widths(folding.model, w, a, input_bits)
    raised = prevent_overflow(folding.model)
    return Prepared(folding.model, folding, *widths_of(folding.model), raised)


def _statistics_at(
    model: nn.Module, w: Widths, a: Widths, input_bits: int | None
) -> contextlib.AbstractContextManager[Any]:
    """Set batch norms to the statistics re-estimated for the widths, for folding."""
    if (w is None and a is None) or not any(map(kept_values, model.modules())):
        return contextlib.nullcontext()
    return bits(model, w=w, a=a, input_bits=input_bits)


def _folded(model: nn.Module, arguments: Arguments | None) -> Folding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the result lists what was not folded
        return fold_batch_norm(model, arguments, forward=lambda m, inputs: inputs.call(m))


def _set_widths(model: nn.Module, w: Widths, a: Widths, input_bits: int | None) -> None:
    if w is not None or a is not None:
        for name, width in (("w", w), ("a", a)):
            if not isinstance(width, Mapping):
                check_width(name, width)
        set_bits(model, w=w, a=a, input_bits=input_bits)
    elif any(width is not None for width in widths_of(model)[1].values()):
        warn_if_stale(model)
    for kind, widths in zip("wa", widths_of(model), strict=True):
        for name, width in widths.items():
            if width is not None and 8 < width < 16:
                raise ValueError(f"{kind} of {name}: export has widths 1 to 8 and 16, got {width}")


class _Nobody:
    """An observer that does nothing, except that quantizers with an observer are not skipped."""

    def update(self, x: Tensor) -> None:
        """Ignore the tensor."""


def _find_sites(model: nn.Module, arguments: Arguments) -> None:
    """Run the model once, so that layers with the same input tensor share a site.

    Raises:
        NotExportableError: the model does not accept the arguments.
    """
    quantizers = named_quantizers(model)
    try:
        with observed(quantizers, dict.fromkeys(quantizers, _Nobody())), torch.no_grad():
            arguments.call(model)
    except (TypeError, KeyError) as error:
        raise NotExportableError(
            f"the model does not accept these inputs: {error}. Pass a tensor, a tuple of arguments or a "
            "mapping of keyword arguments"
        ) from error


def _check_model(model: nn.Module) -> None:
    layers = named_layers(model)
    if not layers:
        raise NotExportableError("the model is not converted: call gradl1_fast.convert(model) first")
    if model.training:
        raise NotExportableError("the model is in training mode: call model.eval() first")
    for name, layer in layers.items():
        if isinstance(layer.weight_quantizer, SlicedWeight):
            raise NotExportableError(
                f"{name} was loaded from an any-bit file and has no float weight; export the run"
            )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise NotExportableError(
                f"{name} is {value.dtype}; export supports float32: call model.float() first"
            )


def _one(widths: Mapping[str, int | None]) -> str:
    distinct = set(widths.values())
    if len(distinct) != 1:
        return "mixed"
    (width,) = distinct
    return "float" if width is None else str(width)
