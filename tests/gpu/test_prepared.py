"""Prepared calls of the CUDA kernels on a GPU, against the passes of the same kernels and against PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiled.host_time import ALLOCATIONS, calls_of, operators
from tests.compiled.prepared import ROUNDING, Arguments, assert_batch_norm_act, assert_ends, assert_sites
from tests.gpu.test_cuda import cuda  # noqa: F401  a fixture
from tests.ops.layouts import channels_last

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SHAPES = [(2, 4, 8, 8), (3, 19, 7, 5), (2, 300, 3, 1), (64, 40, 33, 17)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
def test_prepared_calls_have_the_bits_of_the_passes(
    dtype: torch.dtype,
    layout: Any,
    cuda: ModuleType,  # noqa: F811
) -> None:
    for shape in SHAPES:
        a = Arguments(shape, dtype, layout, "cuda")
        assert_sites(a, cuda)
        for quantized in (False, True):
            assert_batch_norm_act(a, cuda, quantized=quantized)
        assert_ends(a, cuda, ROUNDING[dtype])


def test_a_prepared_call_asks_torch_for_memory_alone_and_waits_nowhere(cuda: ModuleType) -> None:  # noqa: F811
    a = Arguments((2, 4, 8, 8), torch.float32, channels_last, "cuda")
    calls = list(calls_of(cuda, a))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, call, arguments in calls:
            assert set(operators(call, arguments)) <= ALLOCATIONS, name
    finally:
        torch.cuda.set_sync_debug_mode("default")
