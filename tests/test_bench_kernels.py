"""The kernel benchmark, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import kernels
from gradl1_fast.backends import reference

X = torch.randn(2, 8, 4, 4)


def test_every_sweep_over_one_tensor_is_measured_and_norms_of_weights() -> None:
    swept = {sweep.name for sweep in kernels.sweeps(X)}
    others = ("conv", "linear", "l1_norm")
    assert swept == {name for name in reference.__all__ if not name.startswith(others)}
    for sweep in kernels.sweeps(X):
        truth = getattr(reference, sweep.name)(*sweep.args)
        assert kernels.agrees(truth, truth, 0.0)


def test_a_sweep_that_is_wrong_gets_no_time() -> None:
    broken = SimpleNamespace(tap_backward=lambda dy: dy.abs().sum() * 1.001)
    row = kernels.measure(kernels.Sweep("tap_backward", (X,), 1), broken, 4 * X.numel(), 1e-4, 1.0)
    assert row["wrong"]
    assert "milliseconds" not in row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_several_times_the_cache(dtype: torch.dtype) -> None:
    cache, image = 50 * 10**6, 256 * 56 * 56 * dtype.itemsize
    assert 4 * cache <= kernels.images(cache, dtype) * image < 4 * cache + image


def test_a_backend_that_cannot_compute_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(*size))
    chosen, failures = kernels.load(["cuda", "reference"])
    assert list(chosen) == ["reference"]
    assert "cuda: " in failures[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", "--backends", "cuda"])
    assert kernels.main() == 1
    assert "no GPU" in capsys.readouterr().err
