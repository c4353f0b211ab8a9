"""Quantiles of times, and the peak of live memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

__all__ = ["peak_bytes", "quantiles", "wait"]


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20, 50 and 80 percent quantiles."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of live tensor bytes during a step, above what is live before it."""
    step()
    if device.type == "cuda":
        wait()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def wait() -> None:
    """Wait until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
