"""An original and its converted twin on one batch, and what a pass through either leaves."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.zoo.entries import Entry, run
from tests.zoo.subjects import loss_of, make, seed, tensors

Named = dict[str, Tensor]


@dataclass
class Pass:
    """Outputs, gradients of the parameters, and buffers after a pass, by name."""

    outputs: Named
    gradients: Named
    buffers: Named


class Case:
    """A model of the zoo, made twice with the same values; one is converted.

    Attributes:
        entry: its row of the table.
        batch: its inputs.
        original: stays as it is.
        model: what was given to ``convert``.
        converted: what came back.
    """

    def __init__(self, entry: Entry, *, with_recipe: bool) -> None:
        self.entry = entry
        self.original, self.batch = make(entry, with_recipe=with_recipe)
        self.model, _ = make(entry, with_recipe=with_recipe)
        self.converted = gl.convert(self.model)
        self._first = {name: t.detach().clone() for name, t in _values(self.original).items()}

    def reset(self, *, training: bool) -> None:
        """Give both their first values again, without gradients."""
        for module in (self.original, self.converted):
            module.train(training).zero_grad()
            values = _values(module)
            with torch.no_grad():
                for name, value in self._first.items():
                    values[name].copy_(value)

    def run(self, module: nn.Module, *, training: bool) -> Pass:
        """Run one of both from its first values on, forward and backward."""
        self.reset(training=training)
        seed()
        outputs = list(tensors(run(module, self.batch)))
        loss_of(outputs).backward()
        return Pass(
            {f"output {i}": t.detach().clone() for i, t in enumerate(outputs)},
            gradients_of(module),
            {name: t.clone() for name, t in module.named_buffers() if name in self._first},
        )

    def outputs(self, module: nn.Module) -> Named:
        """Return the outputs in evaluation mode; the values are as they are."""
        module.eval()
        seed()
        with torch.no_grad():
            return {f"output {i}": t.clone() for i, t in enumerate(tensors(run(module, self.batch)))}

    @property
    def layers(self) -> list[str]:
        """Names of the convolutions and linear layers of the original."""
        return [name for name, m in self.original.named_modules() if _is_layer(m)]

    @property
    def quantized(self) -> list[str]:
        """Names of the layers of the converted model that have a quantizer for their weight."""
        return [name for name, m in self.converted.named_modules() if hasattr(m, "weight_quantizer")]

    @property
    def with_site(self) -> list[str]:
        """Names of those that have one for their input."""
        quantizers = {name: getattr(m, "input_quantizer", None) for name, m in self.converted.named_modules()}
        return [name for name, quantizer in quantizers.items() if quantizer is not None]

    @functools.cached_property
    def report(self) -> Any:
        """What the library says of the converted model with 4-bit weights, after a pass with a penalty."""
        with gl.bits(self.converted, w=4, a=None):
            return gl.report(self.converted)

    @property
    def left_in_float(self) -> set[str]:
        """Names of the layers of which it says that their weight is used by function, or was never used."""
        return {n for n, kind in self.report.unquantized if kind.startswith(("weight used by", "not called"))}


def gradients_of(module: nn.Module) -> Named:
    """Return the gradients of the parameters, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def _values(module: nn.Module) -> Named:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _is_layer(module: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"
