"""Operators of the linear layer; see the reference backend for the derivation."""

from __future__ import annotations

from gradl1_fast.backends import reference
from gradl1_fast.ops._bilinear import differentiate_bilinear
from gradl1_fast.ops._library import Operator

linear_forward = Operator(
    "linear",
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.linear_forward,
)
linear_backward = Operator(
    "linear",
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] output_mask) -> (Tensor, Tensor)",
    reference.linear_backward,
)
linear_double_backward = Operator(
    "linear",
    "linear_double_backward(Tensor? d_dx, Tensor? d_dweight, Tensor dy, Tensor x, Tensor weight, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    reference.linear_double_backward,
)
differentiate_bilinear(linear_forward, linear_backward, linear_double_backward, channel_axis=-1)
