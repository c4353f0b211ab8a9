"""Weights as codes, and the ONNX integer types that store codes of a width."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from gradl1_fast.nn.codes import along, codes
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.rounded import MadeFor
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization.export.packages import onnx, onnxruntime

__all__ = [
    "IntegerType",
    "codes",
    "integer_type",
    "integer_widths",
    "prevent_overflow",
    "session",
    "shift_of",
    "to_bytes",
]

_LARGEST_BIAS = 2.0**30  # half the range of int32, in units of the product of two scales


@dataclass(frozen=True)
class IntegerType:
    """An ONNX integer type.

    Attributes:
        name: such as ``"INT4"``.
        bits: the bits of the type, 2, 4, 8 or 16; at least those of the codes.
        opset: the first opset version with the type.
    """

    name: str
    bits: int
    opset: int

    @property
    def code(self) -> int:
        """The ONNX number of the type."""
        return int(getattr(onnx().TensorProto, self.name))


_OPSETS = {2: 25, 4: 21, 8: 17, 16: 21}


def integer_type(bits: int, *, signed: bool, narrow: bool = True) -> tuple[IntegerType, str | None]:
    """Return the type for codes of a width, and a remark if a narrower type could not be used.

    Codes of 2, 4, 8 and 16 bits have types of the same width; other codes take 8 bits. Codes of 2 and 4 bits
    also take 8 bits if the installed packages do not support their types, or if ``narrow`` is False.

    Raises:
        ValueError: ``bits`` is from 9 to 15, which no runtime supports.
    """
    if 8 < bits < 16:
        raise ValueError(f"export has widths 1 to 8 and 16, got {bits}")
    prefix = "INT" if signed else "UINT"
    own = IntegerType(f"{prefix}{bits}", bits, _OPSETS.get(bits, 0))
    wide = IntegerType(f"{prefix}8", 8, _OPSETS[8])
    if bits not in _OPSETS or (bits < 8 and not narrow):
        return wide, None
    if bits in (2, 4) and not _runs(own):
        return wide, (
            f"{own.name} needs opset {own.opset}, which the installed onnx and onnxruntime cannot run: "
            f"the codes are in {wide.name}"
        )
    return own, None


@functools.cache
def _runs(type_: IntegerType) -> bool:
    """Return whether the installed packages can quantize to a type and back."""
    helper, proto = onnx().helper, onnx().TensorProto
    if not hasattr(proto, type_.name) or onnx().defs.onnx_opset_version() < type_.opset:
        return False
    scale = helper.make_tensor("scale", proto.FLOAT, [], [1.0])
    zero = helper.make_tensor("zero", type_.code, [], [0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, proto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], [scale, zero])
    opsets = [helper.make_opsetid("", type_.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    try:
        session(model.SerializeToString())
    except Exception:  # the runtime's errors have no common class
        return False
    return True


def integer_widths(layer: QuantizedLayer) -> tuple[int, int] | None:
    """Return the bits of weight and input if 8-bit integer kernels can compute a layer, otherwise None."""
    # onnxruntime has no integer kernel for a transposed convolution.
    return None if isinstance(layer, _ConvTransposeNd) else _small_widths(layer)


def _small_widths(layer: QuantizedLayer) -> tuple[int, int] | None:
    """Return the bits of weight and input if both are quantized to at most 8 bits, otherwise None."""
    weight, inputs = layer.weight_quantizer.bits, layer.input_quantizer
    site = None if inputs is None else inputs.bits
    return None if weight is None or site is None or max(weight, site) > 8 else (weight, site)


def shift_of(bits: int) -> int:
    """Return the number of bits by which codes below 8 bits are shifted to fill 7 of 8 bits.

    The values do not change, because the scale is divided by the same factor, and biases are rounded as
    finely as at 7 bits. At 7 bits the sum of two products fits the 16 bits that some processors use for it.
    """
    return max(0, 7 - bits)


@torch.no_grad()
def prevent_overflow(model: nn.Module) -> dict[str, int]:
    """Raise weight scales whose bias would not fit int32; return the number of raised scales by layer.

    Runtimes store a bias as a multiple of the product of the weight's and the input's scale. A channel with
    vanishing weights and a bias, left by a dead batch norm, would overflow. onnxruntime does so for
    transposed convolutions too, although it computes them in float. Above 8 bits, it adds biases in float.
    """
    layers = named_layers(model).items()
    return {name: count for name, count in ((name, _raise_scales(layer)) for name, layer in layers) if count}


def _raise_scales(layer: QuantizedLayer) -> int:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    bias, widths = getattr(layer, "bias", None), _small_widths(layer)
    if bias is None or inputs is None or inputs.low is None or widths is None:
        return 0
    scale, _, _, q_max = weights.grid(used_weight(layer), widths[0])
    largest = bias.detach().abs()
    if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:  # the groups share their scales
        largest = largest.reshape(layer.groups, -1).amax(0)
    least = largest / (inputs.grid(torch.float32, widths[1])[0] * _LARGEST_BIAS)
    least *= 2 ** shift_of(widths[0])
    if weights.axis is None:
        least = least.max()
    low = scale < least
    if not bool(low.any()):
        return 0
    clip = torch.where(low, least, scale) * max(q_max, 1)
    with _codes_kept(layer, low):
        weights.set_clip(clip.reshape(1, -1))
    return int(low.sum())


@contextlib.contextmanager
def _codes_kept(layer: QuantizedLayer, changed: Tensor) -> Iterator[None]:
    """Keep the stored codes of a layer while scales change; changed channels are rounded to nearest."""
    quantizer, bits = layer.weight_quantizer, layer.weight_quantizer.bits
    made_for = None if bits is None else quantizer.made_for(bits)
    weight = used_weight(layer)
    if bits is None or made_for is None:
        yield
        return
    chosen = quantizer.codes_of(weight, bits)
    quantizer.set_rounded(bits, None)
    yield
    nearest = quantizer.codes_of(weight, bits)
    kept = torch.where(along(changed, weight, quantizer.axis), nearest, chosen)
    quantizer.set_rounded(bits, kept, MadeFor.of(weight, quantizer.clip, made_for.name))


def session(model: bytes, *, fused: bool = True, exact: bool = True) -> Any:
    """Return an onnxruntime session of a model on the CPU.

    Args:
        model: the content of a file.
        fused: use the default of onnxruntime, with quantized operations in integer arithmetic; otherwise each
            node is computed separately in float.
        exact: do not let sums of products overflow on x86 processors without VNNI (session option
            ``session.x64quantprecision``), as a default session does with weights outside of -64 to 63.
            onnxruntime cannot apply it to a weight that two nodes share; such a file gets a default session.
    """
    entries = {} if fused else {"session.disable_quant_qdq": "1"}
    if exact:
        with contextlib.suppress(Exception):  # the runtime's errors have no common class
            return _session(model, {**entries, "session.x64quantprecision": "1"})
    return _session(model, entries)


def _session(model: bytes, entries: dict[str, str]) -> Any:
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4  # fatal messages only; errors are raised as exceptions
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_bytes(codes: Tensor, bits: int) -> bytes:
    """Return integers in the storage of ONNX; types below 8 bits are packed, lowest bits first."""
    if bits == 16:
        return codes.to(torch.int16).numpy().tobytes()
    flat = codes.to(torch.int16).flatten()  # unsigned codes of 8 bits do not fit int8
    count = 8 // bits
    padded = torch.nn.functional.pad(flat & (2**bits - 1), (0, -len(flat) % count)).reshape(-1, count)
    shifts = torch.arange(0, 8, bits, dtype=torch.int16)
    return (padded << shifts).sum(1).to(torch.uint8).numpy().tobytes()
