"""Times and memory of steps, taken in turn, so that ratios within one run mean something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved_times", "peak_bytes", "quantiles"]


def interleaved_times(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 3
) -> dict[str, list[float]]:
    """Return the times of each step in milliseconds; every round takes each step once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20, 50 and 80 percent quantiles."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of live tensor bytes during a step, above what is live before it."""
    step()
    if device.type == "cuda":
        _wait()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
