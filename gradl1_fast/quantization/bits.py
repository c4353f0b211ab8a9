"""Sets the bit widths of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.freshness import warn_if_stale
from gradl1_fast.quantization.kept import use_values

__all__ = [
    "INPUT_BITS",
    "Widths",
    "bits",
    "check_input_bits",
    "check_width",
    "set_bits",
    "width_at",
    "widths_of",
]

Widths = int | None | Mapping[str, int | None]
INPUT_BITS = 8


def set_bits(model: nn.Module, *, w: Widths, a: Widths, input_bits: int | None = INPUT_BITS) -> None:
    """Set the width of all weights and activations, or of the named ones, without copying anything.

    It warns once if weights have changed since the activation ranges were calibrated. Batch norms use the
    statistics that :func:`gradl1_fast.reestimate_batch_norm` estimated for these widths, if there are any.

    Args:
        model: a converted model.
        w: bits of the weights including embeddings, 1 to 16, or None for float; or a mapping from names of
            layers to bits. Weights that are not in the mapping keep their width.
        a: bits of the activations, 1 to 16 or None, or a mapping from names of sites to bits. Call
            :func:`calibrate` first. A site that no value reached in calibration has no range and raises an
            error when a value reaches it.
        input_bits: minimum bits of the network input if ``a`` is a single width, because quantizing an image
            below 8 bits costs more than quantizing any activation; None keeps the input in float.
            ``a=None`` means float everywhere. A mapping sets each site exactly, so only the default is
            accepted with one.

    Raises:
        TypeError: a width is not an int or None.
        ValueError: a width is out of range, or wider than what was read of an any-bit file, a name is
            unknown, ``input_bits`` is given with a mapping, or the model has no quantizers.
        RuntimeError: no activation has a range yet, or a named one has none. The model is then unchanged.

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
        >>> gl.calibrate(model, [torch.randn(8, 4)])
        >>> gl.set_bits(model, w=4, a=4)
        >>> model[0].input_quantizer.bits, model[2].input_quantizer.bits
        (8, 4)
    """
    weights = {name: layer.weight_quantizer for name, layer in named_layers(model).items()}
    activations = named_quantizers(model)
    if not weights and not activations:
        raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
    check_input_bits(a, input_bits)
    w_by_name, a_by_name = _by_name("w", w, weights), _by_name("a", a, activations)
    if not isinstance(a, Mapping):
        a_by_name = {name: width_at(q, a, input_bits) for name, q in activations.items()}
    _check_ranges(a_by_name, activations, named=isinstance(a, Mapping))
    _check_widest(w_by_name, weights)
    if any(width is not None for width in a_by_name.values()):
        warn_if_stale(model)
    for name, width in w_by_name.items():
        weights[name].bits = width
    for name, width in a_by_name.items():
        activations[name].bits = width
    use_values(model)


@contextlib.contextmanager
def bits(
    model: nn.Module, *, w: Widths, a: Widths, input_bits: int | None = INPUT_BITS
) -> Iterator[nn.Module]:
    """Context manager that sets widths like :func:`set_bits` inside the ``with`` block.

    Each quantizer's previous width is restored at the end, also after an exception.

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
    set_bits(model, w=w, a=a, input_bits=input_bits)
    try:
        yield model
    finally:
        for quantizer, width in before:
            quantizer.bits = width
        use_values(model)


def width_at(quantizer: ActivationQuantizer, a: int | None, input_bits: int | None) -> int | None:
    """Return the bits of a site if all have the width ``a``; see :func:`set_bits`."""
    if a is None or not quantizer.is_input:
        return a
    return None if input_bits is None else max(a, input_bits)


def widths_of(model: nn.Module) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Return the current widths of weights by layer, and of activations by site."""
    weights = {name: layer.weight_quantizer.bits for name, layer in named_layers(model).items()}
    return weights, {name: quantizer.bits for name, quantizer in named_quantizers(model).items()}


def check_width(name: str, value: int | None) -> None:
    """Check a width: an int from 1 to 16, or None for float."""
    if value is not None:
        check.bits(value, f"{name} (None for float)")


def check_input_bits(a: Widths, input_bits: int | None) -> None:
    """Check the minimum bits of the network's input, which has no effect if ``a`` is a mapping."""
    check_width("input_bits", input_bits)
    if isinstance(a, Mapping) and input_bits != INPUT_BITS:
        raise ValueError(
            f"input_bits = {input_bits}: a is a mapping, which sets each site exactly; give the width of the "
            "network's input in it, or a single width for a"
        )


def _by_name(kind: str, widths: Widths, valid: Mapping[str, object]) -> Mapping[str, int | None]:
    if not isinstance(widths, Mapping):
        check_width(kind, widths)
        return dict.fromkeys(valid, widths)
    unknown = [name for name in widths if name not in valid]
    if unknown:
        raise ValueError(f"{kind}: unknown name {', '.join(map(repr, unknown))}; the names are {list(valid)}")
    for name, width in widths.items():
        check_width(f"{kind}[{name!r}]", width)
    return widths


def _check_ranges(
    widths: Mapping[str, int | None], quantizers: Mapping[str, ActivationQuantizer], *, named: bool
) -> None:
    """Raise if a named site, or every site of the model, has no range."""
    quantized = [name for name, width in widths.items() if width is not None]
    missing = [name for name in quantized if quantizers[name].low is None]
    if missing and (named or len(missing) == len(quantized)):
        raise RuntimeError(
            f"no activation range for {', '.join(missing)}: call gradl1_fast.calibrate(model, batches) first"
        )


def _check_widest(widths: Mapping[str, int | None], quantizers: Mapping[str, WeightQuantizer]) -> None:
    for name, width in widths.items():
        widest = quantizers[name].widest
        if width is not None and width > widest:
            raise ValueError(
                f"w = {width}: only {widest} bits were read from the any-bit file; load more bits"
            )
