"""Any-bit files: a single file for every width, with weights as bit planes and the rest of the model.

The file is safetensors. Its entries, where ``<layer>`` and ``<site>`` are names in the model:

- ``plane.0.<layer>`` to ``plane.7.<layer>``: uint8, one bit of each weight, most significant first, packed;
- ``scale.<layer>``: scale of the 8-bit grid, a scalar or one value per output channel;
- ``shape.<layer>``: int64, shape of the weight;
- ``low.<site>``, ``high.<site>``: range of the input of a layer, absent if there is none;
- ``is_input.<site>``: uint8, 1 for the network's input;
- ``state.<key>``: every other entry of the state dict: biases, norms, unquantized weights, and the parameters
  that a weight is computed from.

Planes come last and in order, so that a reader of w bits reads only the beginning of the file.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor, nn

from gradl1_fast import _safetensors
from gradl1_fast._dtypes import sum_dtype
from gradl1_fast._safetensors import Entry, TensorFile
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.nn.state_dicts import load_entries
from gradl1_fast.quantization import bit_planes
from gradl1_fast.quantization._sites import Stored, by_quantizer, every_site, same_range
from gradl1_fast.quantization.freshness import warn_if_stale
from gradl1_fast.quantization.sliced import SlicedWeight, has_own_weight, refuse_sliced, slice_weight

__all__ = ["load_any_bit", "save_any_bit"]

METADATA = {"format": "gradl1_fast.any_bit", "version": "2"}


def save_any_bit(model: nn.Module, path: str | os.PathLike[str]) -> dict[int, int]:
    """Write a model into one file for every width from 1 to 8.

    Each weight is rounded once, on its 8-bit grid; the first w bits of its code are its w-bit code. A code
    of w bits represents 256 / 2**w codes of 8 bits and is read as their midpoint, so that dropping bits adds
    no bias. At 8 bits the weights are exactly those of ``gl.bits(model, w=8)``. At fewer bits, values are
    offset from zero by half a step, and none is zero. In measurements this is as accurate as quantizing
    directly, and more accurate from 4 bits down (``docs/any-bit.md``).

    The file is replaced atomically.

    Args:
        model: a converted model. If it is calibrated, the activation ranges are saved.
        path: path of the file, usually ending in ``.safetensors``.

    Returns:
        The number of bytes from the beginning of the file that a reader needs, by width.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model has no layers of this library, or a weight or another entry of the state dict
            holds NaN or infinity; the message names it.
        OSError: the file cannot be written.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> reads = gl.save_any_bit(model, "model.safetensors")
        >>> reads[4] < 0.7 * reads[8]
        True
        >>> narrow = gl.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> narrow = gl.load_any_bit(narrow, "model.safetensors", w=4)
    """
    _safetensors.require("any-bit files", "export")
    layers = _layers(model)
    if any(layer.weight_quantizer.rounded for layer in layers.values()):
        warnings.warn(
            "save_any_bit: the codes chosen by gradl1_fast.round_weights are not saved: codes of one width "
            "are not the first bits of the codes of another",
            stacklevel=2,
        )
    entries = {f"state.{key}": value for key, value in _state(model, layers).items()}
    for name, quantizer in every_site(model).items():
        entries[f"is_input.{name}"] = torch.tensor(quantizer.is_input, dtype=torch.uint8)
        if quantizer.low is not None and quantizer.high is not None:
            entries |= {f"low.{name}": quantizer.low, f"high.{name}": quantizer.high}
    for name, layer in layers.items():
        entries |= _encoded(name, layer)
    if any(key.startswith("low.") for key in entries):
        warn_if_stale(model)
    for key, value in entries.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"save_any_bit: {key!r} holds NaN or infinity")
    _safetensors.save(path, entries, METADATA, what="any-bit files")
    with TensorFile(path, whole=False) as file:
        return {w: file.end_of([_plane(w - 1, name) for name in layers]) for w in _widths()}


def load_any_bit(model: nn.Module, path: str | os.PathLike[str], *, w: int = 8) -> nn.Module:
    """Load the first ``w`` bits of the weights in an any-bit file, and everything else in it, into a model.

    Only the bytes of these bits are read; the file may be truncated after them. The layers of the model then
    store one byte per weight instead of the float weight, and decode it in each forward pass.
    ``gl.set_bits(model, w=v, a=...)`` sets any width v up to ``w`` at any time and copies nothing; ``w=None``
    is the widest. Such a model is for evaluation: it has no weights to train, fold or export.
    ``layer.weight`` takes no memory; code that reads it without calling the layer, as in
    ``F.linear(x, self.qkv.weight)``, gets the decoded values at the current width. Code that changes it in
    place raises an error.

    The file is read as data; nothing in it is executed, and every entry is checked before the model changes.

    Args:
        model: a converted model of the structure that was saved. It is changed in place.
        path: path of the file.
        w: number of bits to read, 1 to 8.

    Returns:
        The model, at width ``w`` of its weights; activations keep their width.

    Raises:
        TypeError: ``w`` is not an int.
        ValueError: ``w`` is out of range, the model is not converted, or the file is damaged or does not
            fit the model. The message names the file and the entry. The model is then unchanged.
        OSError: the file cannot be read.
    """
    _check_width(w)
    layers = named_layers(model)
    if not layers:
        raise ValueError("load_any_bit: the model is not converted: call gradl1_fast.convert(model) first")
    with TensorFile(path, whole=False) as file:
        file.check_metadata(METADATA)
        sliced = {name: _read_weight(file, name, layer, w) for name, layer in layers.items()}
        ranges = _read_ranges(file, model)
        state = {
            key: file.read(f"state.{key}", Entry(value.dtype, tuple(value.shape)))
            for key, value in _state(model, layers).items()
        }
        file.check_that_all_are_known([_plane(i, name) for name in layers for i in range(bit_planes.WIDTH)])
    for name, layer in layers.items():
        slice_weight(layer, sliced[name])
    for _, quantizer, (low, high, is_input) in by_quantizer(every_site(model), ranges):
        quantizer.low, quantizer.high, quantizer.is_input = low, high, is_input
    load_entries(model, state, strict=False)
    return model


def _widths() -> range:
    return range(1, bit_planes.WIDTH + 1)


def _check_width(w: object) -> None:
    if isinstance(w, bool) or not isinstance(w, int):
        raise TypeError(f"load_any_bit: w must be an int from 1 to {bit_planes.WIDTH}, got {w!r}")
    if w not in _widths():
        raise ValueError(f"load_any_bit: w must be from 1 to {bit_planes.WIDTH}, got {w}")


def _plane(number: int, name: str) -> str:
    return f"plane.{number}.{name}"


def _layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    layers = named_layers(model)
    if not layers:
        raise ValueError("save_any_bit: the model is not converted: call gradl1_fast.convert(model) first")
    refuse_sliced(model, "save_any_bit")
    for name, layer in layers.items():
        if not used_weight(layer).isfinite().all():
            raise ValueError(f"save_any_bit: the weight of {name!r} holds NaN or infinity")
    return layers


def _state(model: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Return the state dict without the weights that are stored as planes, under any of their names."""
    ours = {id(layer) for layer in layers.values() if has_own_weight(layer)}
    weights = {
        f"{name}.weight".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in ours
    }
    return {key: value for key, value in model.state_dict().items() if key not in weights}


def _encoded(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    weight, quantizer = used_weight(layer), layer.weight_quantizer
    scale = quantizer.grid(weight, bit_planes.WIDTH)[0]
    codes = bit_planes.encode(weight, scale, quantizer.axis)
    planes = {_plane(i, name): bit_planes.pack(codes, i) for i in range(bit_planes.WIDTH)}
    return {f"scale.{name}": scale, f"shape.{name}": torch.tensor(weight.shape), **planes}


def _read_weight(file: TensorFile, name: str, layer: QuantizedLayer, w: int) -> SlicedWeight:
    old = layer.weight_quantizer
    weight = old.codes if isinstance(old, SlicedWeight) else used_weight(layer)
    shape, device = tuple(weight.shape), weight.device
    dtype = old.like.dtype if isinstance(old, SlicedWeight) else weight.dtype
    stored = file.read(f"shape.{name}", Entry(torch.int64, (len(shape),)))
    if tuple(stored.tolist()) != shape:
        raise file.error(f"shape.{name}", f"the weight of this model has shape {shape}", stored.tolist())
    channels = () if old.axis is None else (shape[old.axis],)
    scale = file.read(f"scale.{name}", Entry(sum_dtype(dtype), channels))
    if not (scale > 0).all():
        raise file.error(f"scale.{name}", "scales must be above 0", scale.min().item())
    entry = Entry(torch.uint8, (bit_planes.plane_bytes(torch.Size(shape).numel()),))
    planes = [file.read(_plane(i, name), entry) for i in range(w)]
    codes = bit_planes.unpack(planes, shape).to(device)
    return SlicedWeight(codes, scale.to(device), w, dtype, old.axis, name=name)


def _read_ranges(file: TensorFile, model: nn.Module) -> dict[str, Stored]:
    """Return the checked ends of each range, on the model's device, and which are of the network's input."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sites = every_site(model)
    ranges = {name: _read_range(file, name, device) for name in sites}
    for name, quantizer, first in by_quantizer(sites, ranges):
        shared = [other for other, q in sites.items() if q is quantizer]
        if any(not same_range(first, ranges[other]) for other in shared):
            raise file.error(
                f"low.{name}", f"{', '.join(shared)} share one tensor in this model", "different ranges"
            )
    return ranges


def _read_range(file: TensorFile, name: str, device: torch.device) -> Stored:
    flag = file.read(f"is_input.{name}", Entry(torch.uint8, ()))
    if int(flag) > 1:
        raise file.error(f"is_input.{name}", "must be 0 or 1", int(flag))
    scratch = ActivationQuantizer()
    if f"low.{name}" in file or f"high.{name}" in file:
        try:
            scratch.set_range(*(_read_end(file, f"{end}.{name}") for end in ("low", "high")))
        except ValueError as error:
            raise file.error(f"low.{name} and high.{name}", "must be a valid range", error) from error
    return scratch.to(device).low, scratch.high, bool(flag)


def _read_end(file: TensorFile, key: str) -> Tensor:
    return file.read(key, *(Entry(dtype, shape) for dtype in _FLOATS for shape in ((), (16,))))


_FLOATS = (torch.float32, torch.float64)
