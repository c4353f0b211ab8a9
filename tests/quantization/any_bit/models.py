"""Networks for any-bit files."""

from __future__ import annotations

import torch
from torch import nn

import gradl1_fast as gl
from tests.networks import VGG, Network

FIRST = "0"  # a layer of VGG, of 4 x 3 x 3 x 3


def converted(network: Network = VGG, *, per_channel: bool = False, calibrated: bool = True) -> nn.Module:
    model = gl.convert(network.make(torch.float32).eval(), per_channel=per_channel)
    if calibrated:
        gl.calibrate(model, [network.batch(torch.float32)])
    return model


def other(network: Network = VGG, *, per_channel: bool = False) -> nn.Module:
    """Return a model of the same structure in which no value is the same."""
    model = converted(network, per_channel=per_channel, calibrated=False)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    return model
