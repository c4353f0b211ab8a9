"""Bias correction: subtracts the shift of each output channel's mean, caused by rounding, from the bias."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradl1_fast.nn.copies import copy_converted
from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import Forward, evaluation, run
from gradl1_fast.quantization.bits import Widths, bits, widths_of
from gradl1_fast.quantization.kept import drop_values
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["correct_bias"]


class _Shift:
    """Mean shift of each output channel from quantizing a layer's weight, over examples and positions."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        quantizer = layer.weight_quantizer
        quantizer.bits = self.bits
        try:
            difference = (layer.forward(*args, **kwargs) - y).double()
        finally:
            quantizer.bits = None
        if isinstance(layer, nn.modules.conv._ConvNd):
            channel = 1 if difference.dim() == layer.weight.dim() else 0
            difference = difference.movedim(channel, -1)
        rows = difference.reshape(-1, difference.shape[-1])
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += len(rows)

    def mean(self, name: str) -> Tensor | None:
        if self.total is None or not self.count:
            return None
        shift = self.total / self.count
        if not bool(shift.isfinite().all()):
            raise ValueError(f"correct_bias: the input or the weight of {name!r} holds NaN or infinity")
        return shift


def correct_bias(
    model: nn.Module, batches: Iterable[Any], *, w: Widths, forward: Forward | None = None
) -> nn.Module:
    """Return a model whose biases compensate for the quantization of its weights at given widths.

    Rounding a weight shifts the mean of each output channel by ``E[(W_hat - W) x]``. The shift is measured
    for each layer on the inputs of the float network, in one pass over the data, and subtracted from the
    bias. The biases then fit only these widths. The model is not changed, and the result shares its weights.
    A layer without a bias gets one, except an embedding. A layer that no batch reaches keeps its bias, and a
    warning names it. Re-estimated statistics are dropped: call :func:`gradl1_fast.reestimate_batch_norm`
    afterwards.

    Args:
        model: a converted model, usually with its batch norms folded.
        batches: as for :func:`gradl1_fast.calibrate`.
        w: bits of the weights, as for :func:`gradl1_fast.set_bits`. Layers in float keep their bias.
        forward: as for :func:`gradl1_fast.calibrate`.

    Returns:
        A new model, with the widths of ``model``.

    Raises:
        TypeError: a width is not an int or None, or ``batches`` is a single tensor.
        ValueError: there is no batch, a width or name is wrong, or the data hold NaN or infinity; the
            message names the layer.

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2, with measured means.
    """
    refuse_sliced(model, "correct_bias")
    result = copy_converted(model)
    drop_values(result)
    with bits(result, w=w, a={}):
        widths = widths_of(result)[0]
    layers = {
        name: layer
        for name, layer in named_layers(result).items()
        if widths[name] is not None and not isinstance(layer, QEmbedding)
    }
    shifts = {name: _Shift(int(widths[name] or 0)) for name in layers}
    with _hooks(layers, shifts), evaluation(result):
        run(result, batches, "correct_bias", forward)
    means = {name: shift.mean(name) for name, shift in shifts.items()}
    for name, layer in layers.items():
        _take_off(layer, means[name])
    missing = [name for name, mean in means.items() if mean is None]
    if missing:
        warnings.warn(
            f"correct_bias: no value reached {', '.join(missing)}: its bias is unchanged", stacklevel=2
        )
    return result


def _take_off(layer: QuantizedLayer, shift: Tensor | None) -> None:
    if shift is None:
        return
    weight = layer.weight
    before = weight.new_zeros(()) if layer.bias is None else layer.bias.detach()
    corrected = (before.double() - shift).to(weight.dtype)
    layer.bias = nn.Parameter(corrected, requires_grad=weight.requires_grad)


@contextlib.contextmanager
def _hooks(layers: Mapping[str, QuantizedLayer], shifts: Mapping[str, _Shift]) -> Iterator[None]:
    hooks = [layer.register_forward_hook(shifts[name], with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
