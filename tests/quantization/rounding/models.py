"""A calibrated and a rounded network, made once."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import VGG

DTYPE = torch.float32
X = VGG.batch(DTYPE)[0]


@functools.cache
def template(per_channel: bool, w: int | None) -> nn.Module:
    """Return a network with stored ranges of weights, convolutions in an order of memory of their own."""
    model: Any = gl.convert(VGG.make(DTYPE).eval(), per_channel=per_channel)
    model.to(memory_format=torch.channels_last)
    gl.calibrate(model, [X], ranges="mse")
    gl.calibrate_weights(model, ranges="mse")
    if w is not None:
        gl.round_weights(model, [X], w=w)
    return model


def calibrated(per_channel: bool = True) -> nn.Module:
    """Return a network that is rounded to nearest."""
    return copy.deepcopy(template(per_channel, None))


def rounded(w: int = 3, *, per_channel: bool = True) -> nn.Module:
    """Return a network with codes at one width."""
    return copy.deepcopy(template(per_channel, w))


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, gl.nn.QuantizedLayer)}


def by_hand(model: nn.Module, w: int) -> nn.Module:
    """Return a model whose float weights are the values of the codes."""
    plain = copy.deepcopy(model)
    for name, layer in layers(model).items():
        quantizer = layer.weight_quantizer
        scale = quantizer.grid(layer.weight.detach(), w)[0]
        shape = [-1, *[1] * (layer.weight.dim() - 1)] if quantizer.axis == 0 else []
        value = quantizer.rounded[w].float() * scale.reshape(shape)
        plain.get_submodule(name).weight = nn.Parameter(value)
    gl.clear_rounding(plain)
    return plain


def output(model: nn.Module, w: int | None, a: int | None = 4) -> Tensor:
    with gl.bits(model, w=w, a=a), torch.no_grad():
        return model(X)


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model gives at the width of its codes, and at others."""
    return {str(w): output(model, w) for w in (3, 4, None)}


def statistics(model: nn.Module) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if "running" in name or "tracked" in name]
