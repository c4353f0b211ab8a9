"""What two networks' steps cost on a GPU: kernel launches, time of the host, time of the step, memory.

    python -m bench.launches --out results

Writes ``<out>/<device>/launches``. A few minutes for ResNet-18 on images of CIFAR's size in float32 and for
ResNet-50 on ImageNet's under bf16 autocast; ``bench.gpu`` measures more networks, and everybody's ways to
take a step, against the oracle.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.measure import peak_bytes, wait
from bench.providers import PLAIN, PROVIDERS, CannotRunError
from bench.workloads import Workload
from gradl1_fast.backends import UnavailableError

__all__ = ["NAMES", "WORKLOADS", "count", "main", "measure", "rows"]

Row = dict[str, Any]
# Each with whether it runs under bf16 autocast.
WORKLOADS = [
    (Workload("resnet18", 64, 128, 32, device="cuda"), False),
    (Workload("resnet50", 64, 64, 224, device="cuda"), True),
]
NAMES = (
    PLAIN,
    "gradl1_fast, no penalty",
    'gradl1_fast, scale="step"',
    "gradl1_fast",
    "eager double backprop",
    "gradl1_fast, CUDA graph",
    "gradl1_fast, cuda",
    "gradl1_fast, reference",
)
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WARM_UP, LIMIT = 5, 150


def main() -> int:
    """Measure; return 1 if there is no device, or a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each kind (default 20)")
    parser.add_argument(
        "--seconds", type=float, default=LIMIT, help=f"no step is begun after this long (default {LIMIT})"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.launches: no GPU, nothing measured", file=sys.stderr)
        return 1
    found = []
    for row in rows(WORKLOADS, NAMES, args.rounds, args.seconds):
        found.append(row)
        print(line(row), flush=True)
    folder = args.out / results.device_name("cuda") / "launches"
    results.write(folder, found, rounds=args.rounds)
    print(f"written to {folder}")
    return int(any("failed" in row for row in found))


def rows(
    workloads: Iterable[tuple[Workload, bool]], names: Iterable[str], rounds: int, seconds: float
) -> Iterator[Row]:
    """Yield a row for each workload and kind of step; those for which there is no time say so."""
    end, names = time.perf_counter() + seconds, list(names)
    for workload, amp in workloads:
        for name in names:
            row = {
                "family": "launches", "operation": workload.network, "sweep": "step", "provider": name,
                "size": workload.numbers(), "dtype": "bfloat16 autocast" if amp else "float32",
                "layout": "channels_last", "device": workload.device,
            }  # fmt: skip
            if time.perf_counter() > end:
                yield {**row, "unavailable": f"left out: the {seconds:.0f} s for all are over"}
            else:
                yield {**row, **_measured(workload, amp, name, rounds)}


def _measured(workload: Workload, amp: bool, name: str, rounds: int) -> Row:
    provider = PROVIDERS[name]
    try:
        return measure(provider.make(workload.task(amp=amp), *provider.terms, ""), rounds, workload.device)
    except (CannotRunError, UnavailableError) as reason:
        return {"unavailable": str(reason)}
    except RuntimeError as error:  # out of memory: the other steps may yet fit
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    finally:
        torch.cuda.empty_cache()


def measure(step: Any, rounds: int, device: str) -> Row:
    """Return the medians of the time until a step has been issued and until it is done, and the rest."""
    for _ in range(WARM_UP):
        step()
    issued, done = [], []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        step()
        issued.append(time.perf_counter() - start)
        wait()
        done.append(time.perf_counter() - start)
    return {
        "launches": launches(step) if device == "cuda" else None,
        "host_ms": round(1e3 * statistics.median(issued), 3),
        "step_ms": round(1e3 * statistics.median(done), 3),
        "peak_bytes": peak_bytes(step, torch.device(device)),
    }


def launches(step: Callable[[], object]) -> int:
    """Return how many kernels a step launches; a CUDA graph is one launch."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        wait()
    return count(event.name for event in profiler.events())


def count(names: Iterable[str]) -> int:
    """Return how many of the names of events are launches."""
    return sum(name.startswith(LAUNCHES) for name in names)


def line(row: Row) -> str:
    """Return a row as a line of text."""
    head = f"{row['operation']:9} {row['dtype']:17} {row['provider']:26}"
    reason = row.get("unavailable") or row.get("failed")
    if reason:
        return f"{head} not measured: {reason}"
    times = f"host {row['host_ms']:8.2f} ms  step {row['step_ms']:8.2f} ms"
    return f"{head} {row['launches']:6} launches  {times}  {row['peak_bytes'] / 2**20:8.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
