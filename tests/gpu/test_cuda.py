"""The CUDA kernels against the reference, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gradl1_fast.backends import UnavailableError, backend, reference, resolve
from tests.compiled.calls import OPERATIONS, SHAPES, l1_norm
from tests.compiled.folded import assert_folds
from tests.compiled.test_host import TOLERANCES, assert_agree, tensors_of
from tests.ops.layouts import LAYOUTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    try:
        with backend("cuda"):
            yield resolve("tap", torch.zeros((), device="cuda"))
    except UnavailableError as reason:
        pytest.skip(str(reason))


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        out = torch.empty_like(value, device="cuda")
        return out.copy_(value)
    return [on_gpu(v) for v in value] if isinstance(value, list) else value


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else [v.cpu() for v in value]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_equals_the_reference(operation: Any, dtype: torch.dtype, layout: str, cuda: ModuleType) -> None:
    change = LAYOUTS.get(layout, Tensor.contiguous)
    tolerance = max(TOLERANCES[dtype], 1e-6 if operation is l1_norm else 0.0)
    for shape in SHAPES:
        for name, arguments in operation(shape, dtype, change):
            expected = getattr(reference, name)(*arguments)
            actual = on_cpu(getattr(cuda, name)(*map(on_gpu, arguments)))
            exact = name == "fake_quantize_forward"
            assert_agree(actual, expected, 0.0 if exact else tolerance, f"{name} of {shape}")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, LAYOUTS["channels_last"]])
def test_quantization_folds_into_batch_norm_bit_for_bit(
    dtype: torch.dtype, layout: Any, cuda: ModuleType
) -> None:
    for shape in [(4, 19, 7, 5), (2, 300, 5, 5), (33, 17, 9, 16)]:
        assert_folds(cuda, shape, dtype, layout, "cuda")


def gpu_calls() -> list[tuple[str, list[Any]]]:
    return [
        (name, [on_gpu(a) for a in arguments])
        for operation in OPERATIONS
        for layout in (Tensor.contiguous, LAYOUTS["channels_last"])
        for name, arguments in operation((16, 64, 24, 24), torch.float32, layout)
    ]


def run(calls: Any, sweeps: ModuleType) -> list[Tensor]:
    return [t for name, arguments in calls for t in tensors_of(getattr(sweeps, name)(*arguments))]


def test_two_runs_are_bit_equal(cuda: ModuleType) -> None:
    calls = gpu_calls()
    for a, b in zip(run(calls, cuda), run(calls, cuda), strict=True):
        assert torch.equal(a, b)


def test_captured_in_a_graph_on_a_side_stream(cuda: ModuleType) -> None:
    calls = gpu_calls()
    expected = run(calls, cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(calls, cuda)
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_more_than_2_to_the_31_elements(cuda: ModuleType) -> None:
    count = 2**31 + 1
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 16 GiB of free GPU memory")
    dy = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    dy[-1] = -3.0
    assert cuda.tap_backward(dy) == 3
    out = cuda.tap_double_backward(None, torch.tensor(0.5, device="cuda"), dy)
    assert out[-1] == -0.5
    assert not out[:-1].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(cuda: ModuleType) -> None:
    dy = torch.randn(1000, device="cuda:1")
    assert_agree(cuda.tap_backward(dy).cpu(), reference.tap_backward(dy.cpu()), 1e-5, "tap")
    assert torch.cuda.current_device() == 0


def test_a_launch_that_fails_names_its_kernel(cuda: ModuleType) -> None:
    from gradl1_fast.backends.compiled._extension import engine
    from gradl1_fast.backends.compiled._tensors import span

    x, out = torch.zeros(8, device="cuda"), torch.zeros(1, device="cuda")
    room = torch.zeros(1000, dtype=torch.float64, device="cuda")
    settings = {"dtype": 0, "layout": (1, 1, 8)}
    memory = {"dy": span(x), "l1": span(out), "scratch": span(room)}
    with pytest.raises(RuntimeError, match="tap_backward: cudaSetDevice"):
        engine("cuda").tap_backward((99, 0), settings, **memory)
