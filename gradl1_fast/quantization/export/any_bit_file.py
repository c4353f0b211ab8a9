"""Registers the any-bit file as an export format."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _files
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization.any_bit import load_any_bit, save_any_bit
from gradl1_fast.quantization.bits import Widths, set_bits, widths_of
from gradl1_fast.quantization.export.agreement import Agreement, compare_model
from gradl1_fast.quantization.export.formats import Details, Format, register
from gradl1_fast.quantization.export.prepared import Prepared
from gradl1_fast.quantization.folding import Folding
from gradl1_fast.quantization.sliced import has_own_weight

__all__ = ["AnyBitFile"]


@dataclass(frozen=True)
class AnyBitFile:
    """A model as an any-bit file.

    Attributes:
        data: the content of the file.
        prepared: the model with weights of 8 bits, as in the whole file.
        sizes: the number of bytes that a reader needs, by width.
        remarks: always empty.
    """

    data: bytes = field(repr=False)
    prepared: Prepared = field(repr=False)
    sizes: dict[int, int]
    remarks: list[str] = field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically."""
        _files.write_bytes(path, self.data)
        return Path(path)


def _write(model: nn.Module, inputs: Any, *, w: Widths = None, a: Widths = None) -> AnyBitFile:
    if (w, a) != (None, None):
        raise ValueError(
            "an any-bit file holds every width: do not give w and a; choose the width when you load the file"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        sizes = save_any_bit(model, path)
        data = path.read_bytes()
    simulation = copy.deepcopy(model).eval()
    set_bits(simulation, w=8, a=None)
    _round_in_place(simulation)
    return AnyBitFile(data, Prepared(simulation, Folding(simulation), *widths_of(simulation)), sizes)


@torch.no_grad()
def _round_in_place(model: nn.Module) -> None:
    """Round the weights to their grids, since code that does not call a layer also reads rounded values."""
    for layer in filter(has_own_weight, named_layers(model).values()):
        layer.weight.copy_(layer.weight_quantizer(layer.weight))


def _compare(file: AnyBitFile, inputs: Any, labels: Tensor | None = None) -> Agreement:
    with tempfile.TemporaryDirectory() as folder:
        model = load_any_bit(copy.deepcopy(file.prepared.model), file.save(Path(folder) / "model"))
    return compare_model(model, file.prepared, inputs, labels=labels)


def _sizes(file: AnyBitFile, inputs: Any) -> list[Details]:
    state = file.prepared.model.state_dict().values()
    float_size = sum(value.numel() * value.element_size() for value in state)
    rows = [(str(w), f"{size:,}", f"{float_size / size:.1f}") for w, size in reversed(file.sizes.items())]
    header = ("bits", "bytes to read", "times smaller than float")
    return [Details(f"Any-bit file; in float the network is {float_size:,} bytes", header, rows)]


_SUMMARY = "one file for every width"
register(Format("any-bit", ".safetensors", _SUMMARY, _write, _compare, _sizes, has_widths=False))
