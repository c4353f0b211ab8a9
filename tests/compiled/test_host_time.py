"""What the wrappers of the extension cost the host in each prepared call, on a GPU and on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradl1_fast.backends import compiled
from gradl1_fast.backends.compiled import _tensors
from tests.compiled.emulated_matrix import PARTS
from tests.compiled.host_time import ALLOCATIONS, BUDGET, allocations, calls_of, functions, operators
from tests.compiled.prepared import Arguments
from tests.ops.layouts import channels_last

# Results, and on a GPU scratch memory where a call takes some.
RESULTS = {
    "batch_norm_act_forward": 4,
    "batch_norm_act_backward": 5,
    "batch_norm_act_backward of ends": 4,
    "batch_norm_act_double_backward": 3,
    "fake_quantize_backward": 2,
    "taps_add_ends_gradients": 2,
}
WITHOUT_SCRATCH = {"tap_double_backward"}
FUNCTIONS = 64  # a loop over each tensor of a call would take more


class Nothing:
    """A half of the extension whose passes compute nothing."""

    def __init__(self, in_host_memory: bool) -> None:
        self.in_host_memory = in_host_memory

    def scratch_bytes(self, layout: Any) -> int:
        return 4096

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("prepare_"), name
        return lambda settings: lambda where, **addresses: None


@pytest.fixture(params=["host", "cuda"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the wrappers of one half call nothing, with the look at the device and its stream on the GPU's."""
    engine = Nothing(request.param == "host")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", int, raising=False)
    for part in PARTS:
        monkeypatch.setattr(f"{part}.engine_for", lambda x: engine, raising=False)
        if request.param == "cuda":
            monkeypatch.setattr(f"{part}.where", lambda x: WHERE(OnGpu), raising=False)
    return request.param


WHERE = _tensors.where
OnGpu: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 3)


def test_a_gpu_call_goes_to_the_current_stream_of_its_device(half: str) -> None:
    assert _tensors.where(OnGpu) == (3, 3) if half == "cuda" else _tensors.where(torch.ones(1))[1] == 0


def test_a_call_allocates_its_results_and_its_scratch_memory_alone(half: str) -> None:
    for name, call, arguments in calls_of(compiled, Arguments((2, 4, 8, 8), torch.float32, channels_last)):
        asked = operators(call, arguments)
        assert set(asked) <= ALLOCATIONS, name
        scratch = half == "cuda" and name not in WITHOUT_SCRATCH
        assert len(asked) == RESULTS.get(name, 1) + scratch, name


def test_the_host_time_of_a_call_is_that_of_a_few_allocations(half: str) -> None:
    for name, call, arguments in calls_of(compiled, Arguments((2, 4, 8, 8), torch.float32, channels_last)):
        count, time = functions(call, arguments), allocations(call, arguments)
        print(f"{half} {name}: {count} functions, the time of {time:.1f} allocations")
        assert count <= FUNCTIONS, name
        assert time <= BUDGET, name
