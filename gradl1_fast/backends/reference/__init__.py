"""Reference backend in pure PyTorch: defines every operation, and runs on any device."""

from gradl1_fast.backends.reference.batch_norm_act import (
    batch_norm_act_backward,
    batch_norm_act_double_backward,
    batch_norm_act_forward,
)
from gradl1_fast.backends.reference.conv import (
    conv_backward,
    conv_double_backward,
    conv_forward,
    conv_transpose_backward,
    conv_transpose_double_backward,
    conv_transpose_forward,
)
from gradl1_fast.backends.reference.fake_quantize import (
    fake_quantize_backward,
    fake_quantize_double_backward,
    fake_quantize_forward,
)
from gradl1_fast.backends.reference.l1_norm import l1_norm_backward, l1_norm_double_backward, l1_norm_forward
from gradl1_fast.backends.reference.linear import linear_backward, linear_double_backward, linear_forward
from gradl1_fast.backends.reference.tap import tap_backward, tap_double_backward

__all__ = [
    "batch_norm_act_backward",
    "batch_norm_act_double_backward",
    "batch_norm_act_forward",
    "conv_backward",
    "conv_double_backward",
    "conv_forward",
    "conv_transpose_backward",
    "conv_transpose_double_backward",
    "conv_transpose_forward",
    "fake_quantize_backward",
    "fake_quantize_double_backward",
    "fake_quantize_forward",
    "l1_norm_backward",
    "l1_norm_double_backward",
    "l1_norm_forward",
    "linear_backward",
    "linear_double_backward",
    "linear_forward",
    "tap_backward",
    "tap_double_backward",
]
