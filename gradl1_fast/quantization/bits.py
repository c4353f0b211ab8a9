"""Choosing the width at which a model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers

__all__ = ["Widths", "bits", "check_width", "set_bits", "widths_of"]

Widths = int | None | Mapping[str, int | None]


def set_bits(model: nn.Module, *, w: Widths, a: Widths) -> None:
    """Set the width of every weight and every activation, or of those named; nothing is copied.

    Args:
        model: a converted model.
        w: bits of the weights, 1 to 16, or None for float. Or a mapping from names of layers to
            bits: weights that are not in it keep their width.
        a: bits of the activations, likewise, by names of quantizers; needs :func:`calibrate` before.

    Raises:
        TypeError: a width is not an int or None.
        ValueError: a width is out of range, or wider than what was read of an any-bit file, a name is
            unknown, or the model has no quantizers.
        RuntimeError: an activation has no range yet. The model is then as it was.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]
        >>> model = gl.convert(torch.nn.Sequential(*layers))
        >>> gl.set_bits(model, w=4, a=None)  # weights alone
        >>> gl.set_bits(model, w={"2": 8}, a={})  # the last layer's weight wider
        >>> gl.set_bits(model, w=4, a=4)
        Traceback (most recent call last):
            ...
        RuntimeError: no activation range for ...: call gradl1_fast.calibrate(model, batches) first
    """
    weights = {name: layer.weight_quantizer for name, layer in named_layers(model).items()}
    activations = named_quantizers(model)
    if not weights and not activations:
        raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
    w, a = _by_name("w", w, weights), _by_name("a", a, activations)
    uncalibrated = [name for name, width in a.items() if width is not None and activations[name].low is None]
    if uncalibrated:
        raise RuntimeError(
            f"no activation range for {', '.join(uncalibrated)}: "
            "call gradl1_fast.calibrate(model, batches) first"
        )
    for name, width in w.items():
        widest = weights[name].widest
        if width is not None and width > widest:
            raise ValueError(
                f"w = {width}: the weights were read from an any-bit file with {widest} bits; read it again"
            )
    for name, width in w.items():
        weights[name].bits = width
    for name, width in a.items():
        activations[name].bits = width


@contextlib.contextmanager
def bits(model: nn.Module, *, w: Widths, a: Widths) -> Iterator[nn.Module]:
    """Set widths as :func:`set_bits` does, for the ``with`` block alone.

    Each quantizer then gets the width that it had, also after an exception.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))
        >>> x = torch.randn(3, 4)
        >>> before = model(x)
        >>> with gl.bits(model, w=2, a=None):
        ...     coarse = model(x)
        >>> torch.equal(coarse, before), torch.equal(model(x), before)
        (False, True)
    """
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)]
    before = [(quantizer, quantizer.bits) for quantizer in quantizers]
    set_bits(model, w=w, a=a)
    try:
        yield model
    finally:
        for quantizer, width in before:
            quantizer.bits = width


def widths_of(model: nn.Module) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Return the present widths of weights, by layer, and of activations, by quantizer."""
    weights = {name: layer.weight_quantizer.bits for name, layer in named_layers(model).items()}
    return weights, {name: quantizer.bits for name, quantizer in named_quantizers(model).items()}


def _by_name(kind: str, widths: Widths, known: Mapping[str, object]) -> Mapping[str, int | None]:
    if not isinstance(widths, Mapping):
        check_width(kind, widths)
        return dict.fromkeys(known, widths)
    unknown = [name for name in widths if name not in known]
    if unknown:
        raise ValueError(f"{kind}: there is no {', '.join(map(repr, unknown))}; there are {list(known)}")
    for name, width in widths.items():
        check_width(f"{kind}[{name!r}]", width)
    return widths


def check_width(name: str, value: int | None) -> None:
    """Check a width: an int from 1 to 16, or None for float."""
    if value is not None:
        check.bits(value, f"{name} (None for float)")
