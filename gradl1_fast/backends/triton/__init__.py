"""Triton kernels of every pass except convolution and linear, which cuDNN and cuBLAS compute best.

Sums are bitwise repeatable: each program writes its partial into a slot of its own, and a second
kernel adds the slots up in one fixed order. No pass synchronises with the host, so a step can be
captured in a CUDA graph once it has run outside of one, which compiles its kernels.
"""

from gradl1_fast.backends.triton._prepared import prepare_fake_quantize, prepare_tap
from gradl1_fast.backends.triton._prepared_batch_norm_act import prepare_batch_norm_act
from gradl1_fast.backends.triton.batch_norm_act import (
    batch_norm_act_backward,
    batch_norm_act_double_backward,
    batch_norm_act_forward,
)
from gradl1_fast.backends.triton.fake_quantize import (
    fake_quantize_backward,
    fake_quantize_double_backward,
    fake_quantize_forward,
)
from gradl1_fast.backends.triton.l1_norm import l1_norm_backward, l1_norm_double_backward, l1_norm_forward
from gradl1_fast.backends.triton.tap import tap_backward, tap_double_backward

__all__ = [
    "batch_norm_act_backward",
    "batch_norm_act_double_backward",
    "batch_norm_act_forward",
    "fake_quantize_backward",
    "fake_quantize_double_backward",
    "fake_quantize_forward",
    "l1_norm_backward",
    "l1_norm_double_backward",
    "l1_norm_forward",
    "prepare_batch_norm_act",
    "prepare_fake_quantize",
    "prepare_tap",
    "tap_backward",
    "tap_double_backward",
]
