"""The measurement of launches and host time, as far as it goes without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import launches
from bench.providers import PROVIDERS
from bench.workloads import Workload

SMALL = Workload("stack", 2, 2, 8, depth=2)


def test_the_workloads_are_those_of_cifar_and_imagenet() -> None:
    found = [(w.network, w.width, w.batch, w.size, amp) for w, amp in launches.WORKLOADS]
    assert found == [("resnet18", 64, 128, 32, False), ("resnet50", 64, 64, 224, True)]
    assert set(launches.NAMES) <= PROVIDERS.keys()


def test_each_step_gets_a_row_with_its_times_or_the_reason() -> None:
    names = ["plain", 'gradl1_fast, scale="step"', "gradl1_fast, CUDA graph"]
    plain, ours, captured = launches.rows([(SMALL, False)], names, 2, 60)
    for row in (plain, ours):
        assert 0 < row["host_ms"] <= row["step_ms"]
        assert row["peak_bytes"] > 0
        assert row["dtype"] == "float32"
        assert row["provider"] in launches.line({**row, "launches": 3})
    assert "CUDA device" in captured["unavailable"]
    assert "not measured" in launches.line(captured)


def test_what_fails_and_what_there_is_no_time_for_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(PROVIDERS["plain"], make=lambda *arguments: torch.ones(2) @ torch.ones(3))
    monkeypatch.setitem(launches.PROVIDERS, "plain", failing)
    (row,) = launches.rows([(SMALL, True)], ["plain"], 1, 60)
    assert row["failed"].startswith("RuntimeError: ")
    assert row["dtype"] == "bfloat16 autocast"
    (row,) = launches.rows([(SMALL, True)], ["plain"], 1, -1)
    assert "left out" in row["unavailable"]


def test_launches_are_counted_by_the_names_of_events() -> None:
    events = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch"]
    assert launches.count([*events, "cudaMemcpyAsync", "aten::add", "void kernel<cudaLaunchKernel>"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["launches"])
    assert launches.main() == 1
    assert "no GPU" in capsys.readouterr().err
