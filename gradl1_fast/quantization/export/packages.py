"""Lazy imports of the optional packages of export."""

from __future__ import annotations

import importlib
from typing import Any

from gradl1_fast._extras import install

__all__ = ["onnx", "onnx_ir", "onnxruntime", "onnxscript"]


def onnx() -> Any:
    """Return the package ``onnx``."""
    _import("onnx.helper")
    return _import("onnx")


def onnxruntime() -> Any:
    """Return the package ``onnxruntime``."""
    return _import("onnxruntime")


def onnxscript() -> Any:
    """Return the package ``onnxscript``, which PyTorch's exporter uses."""
    return _import("onnxscript")


def onnx_ir() -> Any:
    """Return the package ``onnx_ir``, a dependency of onnxscript."""
    _import("onnx_ir.passes.common")
    return _import("onnx_ir")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"export needs {name.split('.')[0]}: {install('export')}") from error
