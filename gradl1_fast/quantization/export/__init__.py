"""Export of a quantized network to formats that run without this library."""

from gradl1_fast.quantization.export.agreement import Agreement, compare, compare_torch
from gradl1_fast.quantization.export.any_bit_file import AnyBitFile
from gradl1_fast.quantization.export.formats import FORMATS, Details, Format
from gradl1_fast.quantization.export.onnx_file import Exported, export_onnx
from gradl1_fast.quantization.export.prepared import NotExportableError, Prepared, simulate
from gradl1_fast.quantization.export.torch_file import export_torch

__all__ = [
    "FORMATS",
    "Agreement",
    "AnyBitFile",
    "Details",
    "Exported",
    "Format",
    "NotExportableError",
    "Prepared",
    "compare",
    "compare_torch",
    "export_onnx",
    "export_torch",
    "simulate",
]
