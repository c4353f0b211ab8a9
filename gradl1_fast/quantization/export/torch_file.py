"""A converted model as a program of ``torch.export`` with integer weights: plain PyTorch operations alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.converted import copy_model
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.rewrite import replace_module
from gradl1_fast.quantization.export.prepared import NotExportableError, Prepared

__all__ = ["export_torch"]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    QConv1d: F.conv1d, QConv2d: F.conv2d, QConv3d: F.conv3d,
}  # fmt: skip


def export_torch(prepared: Prepared, inputs: Tensor) -> bytes:
    """Return the content of a ``.pt2`` file, to be read by ``torch.export.load`` without this library.

    Weights are codes, int8 up to 8 bits and int16 beyond, and their steps; activations are rounded to their
    grids in float. The batch is of any size.

    Args:
        prepared: of :func:`gradl1_fast.quantization.export.prepare`.
        inputs: a batch of two inputs or more.

    Raises:
        NotExportableError: ``torch.export`` cannot take the model.
    """
    model = copy_model(prepared.model)
    for name, old in list(model.named_modules()):
        new = _plain(name, old, prepared)
        if new is not None:
            replace_module(model, old, new.eval())
    try:
        with torch.no_grad():
            batch = torch.export.Dim("batch")
            program = torch.export.export(model, (inputs,), dynamic_shapes=({0: batch},))
    except Exception as error:  # the exporter raises errors of many classes
        raise NotExportableError(f"torch.export cannot take the model: {error}") from error
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _plain(name: str, module: nn.Module, prepared: Prepared) -> nn.Module | None:
    if isinstance(module, QuantizedLayer):
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise NotExportableError(f"{name} has a padding_mode other than 'zeros'")
        return _IntegerLayer(module, prepared.w)
    if isinstance(module, ActivationQuantizer):
        return nn.Identity() if prepared.a is None else _Rounding(module, prepared.a)
    return _PlainNorm(module, prepared.a) if isinstance(module, BatchNormAct2d) else None


class _IntegerLayer(nn.Module):
    """A convolution or linear layer whose weight is codes and steps."""

    def __init__(self, layer: Any, w: int | None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        if w is None:
            self.register_buffer("codes", weight)
            self.scale = None
        else:
            scale, _, q_min, q_max = layer.weight_quantizer.grid(weight, w)
            if layer.weight_quantizer.axis is not None:
                scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
            codes = (weight / scale).round().clamp(q_min, q_max)
            self.register_buffer("codes", codes.to(torch.int8 if w <= 8 else torch.int16))
            self.register_buffer("scale", scale)
        self.function = _CONVOLUTIONS.get(type(layer), F.linear)
        self.how: tuple[Any, ...] = ()
        if type(layer) in _CONVOLUTIONS:
            self.how = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes if self.scale is None else self.codes * self.scale
        return self.function(x, weight, self.bias, *self.how)


class _Rounding(nn.Module):
    """An activation quantizer in PyTorch's own operations."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer, bits: int) -> None:
        super().__init__()
        scale, zero_point, self.q_min, self.q_max = quantizer.grid(torch.float32, bits)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        codes = ((x / self.scale).round() + self.zero_point).clamp(self.q_min, self.q_max)
        return (codes - self.zero_point) * self.scale


class _PlainNorm(nn.Module):
    """A batch norm that could not be folded, with what follows it."""

    def __init__(self, norm: BatchNormAct2d, bits: int | None) -> None:
        super().__init__()
        self.norm = norm.to_float().requires_grad_(False)
        self.activation = norm.activation
        rounds = norm.quantizer is not None and bits is not None
        self.quantizer = _Rounding(norm.quantizer, bits) if rounds else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x) if residual is None else self.norm(x) + residual
        if self.activation == "relu":
            y = y.relu()
        elif self.activation == "relu6":
            y = F.relu6(y)
        return self.quantizer(y)
