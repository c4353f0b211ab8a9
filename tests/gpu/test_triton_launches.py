"""What only a GPU can show of the Triton kernels: size, streams, graphs, memory, devices."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import gradl1_fast as gl
from gradl1_fast.backends import reference, resolve, triton
from tests.triton.checks.network import Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")
BEYOND = 2**31 + 1


def needs(gib: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def test_triton_is_chosen() -> None:
    assert resolve("tap", torch.ones(1, device=CUDA)) is triton
    assert resolve("conv", torch.ones(1, device=CUDA)) is reference


def test_elementwise_beyond_2_to_the_31_elements() -> None:
    needs(20)
    x = torch.zeros(BEYOND, device=CUDA, dtype=torch.bfloat16)
    x[-1], x[2**31 - 1] = -3.0, 2.0
    one = torch.ones((), device=CUDA)
    assert triton.tap_backward(x).item() == 5
    d_dy = triton.tap_double_backward(None, one, x)
    assert (d_dy[-1].item(), d_dy[2**31 - 1].item(), d_dy.count_nonzero().item()) == (-1, 1, 2)
    del d_dy
    y = triton.fake_quantize_forward(x, one, one * 0, -2, 2, None)
    assert (y[-1].item(), y[2**31 - 1].item(), y.count_nonzero().item()) == (-2, 2, 2)
    del y
    dx, l1 = triton.fake_quantize_backward(x, x, one, one * 0, -2, 2, None, True)
    assert (dx[-1].item(), dx[2**31 - 1].item(), l1.item()) == (0, 2, 5)
    del dx
    norms = triton.l1_norm_forward([x, x[:-1]])
    assert norms.tolist() == [5, 2]
    (dx,) = triton.l1_norm_backward(one[None] * 2, [x])
    assert (dx[-1].item(), dx.count_nonzero().item()) == (-2, 2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_beyond_2_to_the_31_elements(channels_last: bool) -> None:
    needs(40)
    shape = (2**15 + 1, 2, 2**8, 2**7)
    x = torch.zeros(shape, device=CUDA, dtype=torch.bfloat16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x[-1] = 1
    ones = torch.ones(2, device=CUDA)
    head, no_grid = (x, ones, ones, None, None, None), (None, None, 0, 0)
    y, _, mean, rstd = triton.batch_norm_act_forward(*head, *no_grid, True, 1e-5, "relu")
    share = 1 / shape[0]
    assert torch.allclose(mean, ones * share, rtol=1e-4)
    assert torch.allclose(rstd, (ones * share * (1 - share) + 1e-5).rsqrt(), rtol=1e-4)
    expected = (1 - share) * rstd[0].item() + 1
    assert abs(y[-1].float().mean().item() / expected - 1) < 1e-2
    dx, _, dbias, _, l1 = triton.batch_norm_act_backward(
        x, x, y, ones, ones, mean, rstd, *no_grid, True, "relu", False, True
    )
    assert torch.isfinite(dx[-1]).all()
    pixels = shape[2] * shape[3]
    assert abs(l1.item() / (2 * pixels) - 1) < 1e-4
    assert torch.allclose(dbias, ones * pixels, rtol=1e-4)


def test_a_side_stream_is_used() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy = torch.randn(4096, 4096, device=CUDA)
        for _ in range(20):
            busy = busy @ busy * 1e-3
        late = busy * 0 + 1
        l1 = triton.tap_backward(late)  # on another stream it would read `late` before it is written
    stream.synchronize()
    assert l1.item() == late.numel()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_device_than_the_current_one() -> None:
    x = torch.randn(1000, device="cuda:1")
    with torch.cuda.device(0):
        assert torch.allclose(triton.tap_backward(x), x.abs().sum())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_captured_step_equals_the_eager_one_to_the_last_bit(
    bits: int | None, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with gl.backend("triton"):
        training = Training(CUDA, torch.float32, layout, bits, width=16, batch=8)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                training.model.zero_grad(set_to_none=True)
                training.step()
            eager = [p.grad.clone() for p in training.model.parameters()]
            training.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            training.step()
    for p in training.model.parameters():
        p.grad.fill_(float("nan"))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, p.grad) for a, p in zip(eager, training.model.parameters(), strict=True))


def test_no_sweep_waits_for_the_device() -> None:
    with gl.backend("triton"):
        training = Training(CUDA, torch.float32, torch.channels_last)
        training.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_is_flat_over_200_steps() -> None:
    with gl.backend("triton"):
        training = Training(CUDA, torch.float32, torch.channels_last)
        used = []
        for _ in range(200):
            training.model.zero_grad(set_to_none=True)
            training.step()
            used.append(torch.cuda.memory_allocated())
    assert len(set(used[5:])) == 1
