"""Modules: layers, quantizers and sites. They contain no arithmetic of their own."""

from gradl1_fast.nn.layers import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QEmbedding,
    QLinear,
    QuantizedLayer,
)
from gradl1_fast.nn.quantizers import ActivationQuantizer, Observer, WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "Observer",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QLinear",
    "QuantizedLayer",
    "WeightQuantizer",
]
