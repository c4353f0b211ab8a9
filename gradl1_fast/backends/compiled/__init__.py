"""The compiled extension: CUDA kernels for CUDA tensors, loops for CPU tensors.

Both halves have the same passes (``csrc/passes.h``); the device of the tensors selects the half. Convolution
and the linear layer are not here: cuDNN and oneDNN compute them, through the reference.
"""

from __future__ import annotations

from types import ModuleType

import torch

from gradl1_fast.backends.compiled._extension import describe, engine
from gradl1_fast.backends.compiled._prepared import prepare_fake_quantize, prepare_tap, prepare_taps
from gradl1_fast.backends.compiled._prepared_batch_norm_act import prepare_batch_norm_act
from gradl1_fast.backends.compiled.batch_norm_act import (
    batch_norm_act_backward,
    batch_norm_act_double_backward,
    batch_norm_act_forward,
)
from gradl1_fast.backends.compiled.fake_quantize import (
    fake_quantize_backward,
    fake_quantize_double_backward,
    fake_quantize_forward,
)
from gradl1_fast.backends.compiled.l1_norm import l1_norm_backward, l1_norm_double_backward, l1_norm_forward
from gradl1_fast.backends.compiled.tap import tap_backward, tap_double_backward

__all__ = [
    "batch_norm_act_backward",
    "batch_norm_act_double_backward",
    "batch_norm_act_forward",
    "describe",
    "fake_quantize_backward",
    "fake_quantize_double_backward",
    "fake_quantize_forward",
    "l1_norm_backward",
    "l1_norm_double_backward",
    "l1_norm_forward",
    "load",
    "prepare_batch_norm_act",
    "prepare_fake_quantize",
    "prepare_tap",
    "prepare_taps",
    "tap_backward",
    "tap_double_backward",
]

_DEVICES = {"host": "cpu", "cuda": "cuda"}


def load(half: str, op: str, device: torch.device) -> ModuleType:
    """Return the backend for ``op`` on ``device`` with one half of the extension, ``"host"`` or ``"cuda"``.

    Raises:
        UnavailableError: the half was not built, cannot be loaded, or does not support this device.
    """
    from gradl1_fast.backends import PRODUCTS, UnavailableError, compiled, reference

    if device.type != _DEVICES[half]:
        raise UnavailableError(
            f"{half!r} computes on {_DEVICES[half]} tensors, and this one is on {device.type}"
        )
    engine(half)
    return reference if op in PRODUCTS else compiled
