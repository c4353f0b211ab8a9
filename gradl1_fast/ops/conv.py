"""Operators of 1D, 2D and 3D convolutions and transposed convolutions; see the reference backend."""

from __future__ import annotations

from gradl1_fast.backends import reference
from gradl1_fast.ops._bilinear import differentiate_bilinear
from gradl1_fast.ops._library import Operator


def _register(op: str, geometry: str) -> tuple[Operator, Operator, Operator]:
    """Register forward, backward and double backward of a convolution.

    On fake tensors, the reference computes shapes, types and strides. The strides are those of PyTorch's
    convolution, which depend on the device and on the layouts of the arguments.
    """
    signatures = {
        "forward": f"(Tensor x, Tensor weight, Tensor? bias, {geometry}) -> Tensor",
        "backward": f"(Tensor dy, Tensor x, Tensor weight, {geometry}, bool[] output_mask) "
        "-> (Tensor, Tensor)",
        "double_backward": "(Tensor? d_dx, Tensor? d_dweight, Tensor dy, Tensor x, Tensor weight, "
        f"{geometry}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    }
    forward, backward, double_backward = (
        Operator(op, f"{op}_{name}{signature}", getattr(reference, f"{op}_{name}"))
        for name, signature in signatures.items()
    )
    differentiate_bilinear(forward, backward, double_backward, channel_axis=1)
    return forward, backward, double_backward


conv_forward, conv_backward, conv_double_backward = _register(
    "conv", "int[] stride, SymInt[] padding, int[] dilation, int groups"
)
conv_transpose_forward, conv_transpose_backward, conv_transpose_double_backward = _register(
    "conv_transpose", "int[] stride, SymInt[] padding, int[] dilation, int[] output_padding, int groups"
)
