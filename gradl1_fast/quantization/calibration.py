"""Ranges of activations, from data or from batch norms, and of weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._progress import track
from gradl1_fast.conversion.products import warn_of_float_products
from gradl1_fast.nn.convertible import warn_of_added_layers
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.quantizers import ActivationQuantizer, Observer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization._modes import Forward, evaluation, run
from gradl1_fast.quantization.freshness import remember_ranges
from gradl1_fast.quantization.ranges.base import MinMax, Range
from gradl1_fast.quantization.ranges.batch_norm import BatchNormStatistics
from gradl1_fast.quantization.ranges.choice import choose
from gradl1_fast.quantization.sliced import refuse_sliced

__all__ = ["calibrate", "calibrate_weights", "observed", "quantizers_of", "set_per_channel", "set_range"]

Ends = tuple[Tensor, Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    ranges: str | Range | BatchNormStatistics = "min_max",
    forward: Forward | None = None,
) -> None:
    """Set the range of every activation quantizer, from one pass over ``batches`` or from batch norms.

    The pass runs in evaluation mode, in float and without gradients: batch-norm statistics and weights do
    not change, and the mode of each module is restored. Memory does not grow with the number of batches.

    If tracing could not, the pass also finds which layers receive the same tensor, and which receive the
    network input. A layer that no batch reaches, such as an auxiliary head that is not used in evaluation,
    gets no range; a warning names its site. Another one names layers that were added after the conversion.

    Args:
        model: a converted model.
        batches: inputs of the model, or tuples or lists whose first entry is the input, as from a
            data loader. A mapping is passed as keyword arguments. Tensors are moved to the device of
            the model's first parameter. None with ``ranges="batch_norm"``, which needs no data.
        ranges: how ranges are found: a name or an object, see :mod:`gradl1_fast.ranges`. With ``"mse"``
            there is one for each width, and :func:`gradl1_fast.bits` takes the right one.
        forward: ``forward(model, batch)`` runs the model on a batch, for models that take several inputs or
            are called in another way.

    Raises:
        ValueError: there is no batch, the model has no activation quantizers, a tensor holds NaN or
            infinity, or no batch norm describes it; the message names the site. The ranges are then
            unchanged.
        TypeError: ``ranges`` is neither a name nor an object of :mod:`gradl1_fast.ranges`, or ``batches`` is
            a single tensor or mapping.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]
        >>> model = gl.convert(torch.nn.Sequential(*layers))
        >>> batches = [torch.randn(16, 4) for _ in range(3)]
        >>> gl.calibrate(model, batches)
        >>> with gl.bits(model, w=4, a=4):
        ...     y = model(batches[0])
        >>> gl.calibrate(model, batches, ranges="percentile")
        >>> pairs = [{"left": x, "right": x} for x in batches]
        >>> gl.calibrate(model, pairs, forward=lambda model, batch: model(batch["left"] - batch["right"]))
    """
    quantizers_of(model)
    warn_of_added_layers("calibrate", model)
    method = choose("calibrate", ranges)
    if isinstance(method, BatchNormStatistics):
        if batches is not None:
            raise ValueError("calibrate: ranges='batch_norm' uses no data; do not pass batches")
        ranges_by_name = _from_batch_norms(model, method)
    elif batches is None:
        raise ValueError("calibrate: pass batches, or use ranges='batch_norm', which needs no data")
    else:
        ranges_by_name = _from_data(model, batches, method, forward)
    _set_all(quantizers_of(model), ranges_by_name)
    remember_ranges(model)
    missing = [name for name, ends in ranges_by_name.items() if ends is None]
    if missing:
        warnings.warn(
            f"calibrate: no value reached {', '.join(missing)}, so no range was set. A layer that is "
            "never called stays in float; calling it at a quantized width is an error",
            stacklevel=2,
        )


def calibrate_weights(model: nn.Module, *, ranges: str | Range = "mse") -> None:
    """Store a range for every weight, from its current values; weights outside the range are clamped.

    Without a stored range, a weight is quantized in its own range, which clamps nothing and follows the
    weight when it changes. A stored range does not change: call this after training. The penalty refuses
    weights that are quantized in a stored range, because clamped weights receive no gradient.

    Args:
        model: a converted model. Each weight has one range, or one for each output channel, as the
            model was converted.
        ranges: a name or an object, see :mod:`gradl1_fast.ranges`; ``"min_max"`` returns to each
            weight's own range. Methods based on batches (moving averages, batch norms) are refused.

    Raises:
        ValueError: the model has no layers of this library, the choice has no meaning for weights, or a
            weight holds NaN or infinity; the message names the layer. The ranges are then unchanged.
        TypeError: ``ranges`` is neither a name nor an object of :mod:`gradl1_fast.ranges`.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))
        >>> gl.calibrate_weights(model, ranges="mse")
        >>> gl.calibrate_weights(model, ranges="min_max")  # back to each weight's own range
    """
    layers = named_layers(model)
    if not layers:
        raise ValueError("the model has no layers of this library: call gradl1_fast.convert(model) first")
    refuse_sliced(model, "calibrate_weights")
    method = choose("calibrate_weights", ranges)
    if not isinstance(method, Range) or not method.for_weights:
        raise ValueError(f"calibrate_weights: {type(method).__name__} supports activations only")
    clips = {
        name: _clip(name, used_weight(layer), layer.weight_quantizer, method)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.weight_quantizer.set_clip(None if isinstance(method, MinMax) else clips[name])


def set_per_channel(model: nn.Module, per_channel: bool) -> None:
    """Switch each weight to one range per output channel, or to one range; drop stored ranges."""
    for layer in named_layers(model).values():
        layer.weight_quantizer.set_clip(None)
        layer.weight_quantizer.axis = layer.out_axis if per_channel else None


def quantizers_of(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers by name; ValueError if there is none."""
    quantizers = named_quantizers(model)
    if not quantizers:
        raise ValueError("the model has no activation quantizers: call gradl1_fast.convert(model) first")
    return quantizers


def set_range(caller: str, name: str, quantizer: ActivationQuantizer, ends: Ends) -> None:
    """Store a range that was measured on values; a ValueError names the quantizer."""
    try:
        quantizer.set_range(*ends)
    except ValueError as error:
        raise ValueError(
            f"{caller}: the values at {name!r} range {error}. Check the batches and the layers before"
        ) from error


@contextlib.contextmanager
def observed(
    quantizers: Mapping[str, ActivationQuantizer], observers: Mapping[str, Observer]
) -> Iterator[None]:
    """Attach an observer to each named quantizer inside the block."""
    before = {name: quantizer.observer for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        yield
    finally:
        for name, quantizer in quantizers.items():
            quantizer.observer = before[name]


class _Watcher:
    """Passes the tensors that reach a quantizer to a range."""

    def __init__(self, method: Range) -> None:
        self.range = copy.deepcopy(method)

    def update(self, x: Tensor) -> None:
        self.range.update(x.reshape(1, -1))


def _from_data(
    model: nn.Module, batches: Iterable[Any], method: Range, forward: Forward | None
) -> dict[str, Ends | None]:
    """Return the ends of each site's range; None if no value reached the site."""
    quantizers = quantizers_of(model)
    watchers = {id(quantizer): _Watcher(method) for quantizer in quantizers.values()}
    with evaluation(model), observed(quantizers, {n: watchers[id(q)] for n, q in quantizers.items()}):
        run(model, batches, "calibrate", forward, first=warn_of_float_products)
    ranges = {n: watchers[id(q)].range for n, q in quantizers_of(model).items()}  # the pass may join sites
    reached = [name for name, values in ranges.items() if values.low is not None]
    ends: dict[str, Ends | None] = dict.fromkeys(ranges)
    return ends | {name: ranges[name].ends() for name in track(reached, "ranges")}


def _from_batch_norms(model: nn.Module, method: BatchNormStatistics) -> dict[str, Ends | None]:
    like = next(p for p in model.parameters())
    try:
        ends = method.ranges(model)
    except ValueError as error:
        raise ValueError(f"calibrate: {error}") from error
    return {name: (like.new_tensor(low), like.new_tensor(high)) for name, (low, high) in ends.items()}


def _set_all(quantizers: Mapping[str, ActivationQuantizer], ends_by_name: Mapping[str, Ends | None]) -> None:
    """Set all ranges, or none if one is invalid."""
    before = {name: (quantizer.low, quantizer.high) for name, quantizer in quantizers.items()}
    try:
        for name, quantizer in quantizers.items():
            ends = ends_by_name[name]
            if ends is None:
                quantizer.low = quantizer.high = None
            else:
                set_range("calibrate", name, quantizer, ends)
    except BaseException:
        for name, quantizer in quantizers.items():
            quantizer.low, quantizer.high = before[name]
        raise


@torch.no_grad()
def _clip(name: str, weight: Tensor, quantizer: WeightQuantizer, method: Range) -> Tensor:
    rows = weight.reshape(1, -1) if quantizer.axis is None else weight.movedim(quantizer.axis, 0).flatten(1)
    ends = copy.deepcopy(method)
    ends.update(rows)
    low, high = ends.ends(symmetric=True)
    clip = torch.maximum(-low, high).clamp(min=0)
    if not bool(clip.isfinite().all()):
        raise ValueError(f"calibrate_weights: the weight of {name!r} holds NaN or infinity")
    return clip
