"""Operators of convolution in 1, 2 and 3 dimensions; the derivation stands in the reference."""

from __future__ import annotations

from gradl1_fast.backends import reference
from gradl1_fast.ops._bilinear import differentiate_bilinear
from gradl1_fast.ops._library import Operator

_GEOMETRY = "int[] stride, SymInt[] padding, int[] dilation, int groups"

# On fake tensors the reference computes nothing but shapes, types and strides, PyTorch's own for
# convolution, which depend on the device and on what the layouts suggest to it.
conv_forward = Operator(
    "conv",
    f"conv_forward(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    reference.conv_forward,
)
conv_backward = Operator(
    "conv",
    f"conv_backward(Tensor dy, Tensor x, Tensor weight, {_GEOMETRY}, bool[] output_mask) -> (Tensor, Tensor)",
    reference.conv_backward,
)
conv_double_backward = Operator(
    "conv",
    "conv_double_backward(Tensor? d_dx, Tensor? d_dweight, Tensor dy, Tensor x, Tensor weight, "
    f"{_GEOMETRY}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    reference.conv_double_backward,
)
differentiate_bilinear(conv_forward, conv_backward, conv_double_backward, channel_axis=1)
