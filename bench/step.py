"""``gradl1 bench step``: a training step by every provider, beside the plain step of the same network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.floors import FLOORS
from bench.measure import quantiles
from bench.oracle import true_gradients
from bench.processes import LostError, Process, interleaved
from bench.providers import PLAIN, PROVIDERS, Provider
from bench.workloads import LAUNCH_BOUND, Workload
from gradl1_fast._progress import track

__all__ = ["SMOKE", "Settings", "empty_row", "gate", "measure", "prepare", "truths", "workloads"]

Row = dict[str, Any]
Objective = tuple[float, float, int | None]
EAGER = ("eager double backprop", "eager double backprop, NCHW")
MEASURED = ("peak_bytes", "operator_calls", "bytes_moved")
# Widths and batches that two CPU cores step through in a fraction of a second; on a GPU the real networks.
_CPU = [("vgg_like", 32, 32), ("resnet18", 32, 32), ("resnet50", 16, 16), ("mobilenet_v2", 16, 16)]
_GPU = [("vgg_like", 64, 256), ("resnet18", 64, 256), ("resnet50", 64, 128), ("mobilenet_v2", 32, 128)]
# The deep ones larger: with a handful of values for a batch norm no gradient in float32 is right.
SMOKE = [
    Workload("vgg_like", 4, 4, 16),
    Workload("resnet18", 8, 4, 16),
    Workload("resnet50", 4, 8, 32),
    Workload("mobilenet_v2", 4, 8, 32),
]


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        rounds: timed steps of each provider.
        warm_up: steps before those.
        compiler: backend of torch.compile.
        limit: seconds that a provider may take to get ready (compile).
        tolerance: of a gradient that should be exact, relative to the oracle's; see :func:`_bound`.
        deep: whether providers that compile do so for the networks after the first.
        providers: names; by default all.
        floors: whether the floors are measured too.
        threads: of each process; None for as many as PyTorch chooses.
    """

    rounds: int = 7
    warm_up: int = 2
    compiler: str = "inductor"
    limit: float = 600
    tolerance: float = 5e-3
    deep: bool = True
    providers: Sequence[str] = field(default_factory=lambda: list(PROVIDERS))
    floors: bool = True
    threads: int | None = None


def workloads(device: str) -> list[Workload]:
    """Return what is measured on a device: four networks at CIFAR's and at ImageNet's image size.

    On a CPU also three that are so small that only issuing operations counts.
    """
    if device == "cuda":
        cifar = [Workload(*sizes, 32, device=device) for sizes in _GPU]
        return cifar + [replace(w, batch=w.batch // 4, size=224) for w in cifar]
    cifar = [Workload(*sizes, 32) for sizes in _CPU]
    return cifar + [replace(w, batch=4, size=96) for w in cifar] + LAUNCH_BOUND


def measure(
    todo: Sequence[Workload], settings: Settings, done: Callable[[Workload, list[Row]], object]
) -> list[Row]:
    """Return a row for each workload and provider, and for each floor.

    Each provider lives in a process of its own. Its gradient is compared with the float64 oracle on the
    very batch that is timed; one that should be exact and is not is not timed.

    Args:
        todo: what to run on.
        settings: how to measure.
        done: called with the rows of each workload as soon as they are there.
    """
    rows: list[Row] = []
    names = list(dict.fromkeys([PLAIN, *settings.providers, *(FLOORS if settings.floors else ())]))
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        processes = {name: stack.enter_context(Process(name, threads=settings.threads)) for name in names}
        for place, workload in enumerate(todo):
            paths = truths(workload, settings.providers, Path(folder))
            found = _measure(workload, processes, paths, settings, settings.deep or not place)
            done(workload, found)
            rows += found
    return rows


def truths(workload: Workload, providers: Iterable[str], folder: Path) -> dict[Objective, str]:
    """Write the oracle's gradient for each objective in use; return where."""
    task = workload.task()
    paths: dict[Objective, str] = {}
    for objective in dict.fromkeys(PROVIDERS[name].objective for name in [PLAIN, *providers]):
        path = paths[objective] = str(folder / f"truth-{len(paths)}.pt")
        torch.save(true_gradients(task.make, task.x, task.y, *objective), path)
    return paths


def _measure(
    workload: Workload,
    processes: dict[str, Process],
    paths: Mapping[Objective, str],
    settings: Settings,
    compile_too: bool,
) -> list[Row]:
    rows = {name: empty_row(workload, name) for name in processes}
    for name in track(list(processes), f"{workload.title()}: gradients"):
        if not compile_too and name in PROVIDERS and PROVIDERS[name].compiles:
            rows[name]["unavailable"] = "left out: it compiles for minutes; --deep measures it too"
            continue
        rows[name] |= prepare(processes[name], workload, paths, settings)
    for name in processes:
        rows[name] |= gate(rows, name, settings.tolerance)
    timed = {n: p for n, p in processes.items() if not _reason(rows[n])}
    turns = range(-settings.warm_up, settings.rounds)
    times = interleaved(timed, track(turns, f"{workload.title()}: steps"))
    for name in track(list(timed), f"{workload.title()}: memory and operators"):
        rows[name] |= _statistics(workload, times, name)
        rows[name] |= _ask(processes[name], "measure", settings.limit)
    return list(rows.values())


def prepare(process: Process, workload: Workload, paths: Mapping[Objective, str], settings: Settings) -> Row:
    """Let a process make its step; return the error of its gradient, or why there is none."""
    provider = PROVIDERS.get(process.provider)
    return _ask(
        process,
        "prepare",
        settings.limit,
        workload=workload.asdict(),
        truth=paths[provider.objective] if provider else None,
        compiler=settings.compiler,
    )


def _ask(process: Process, what: str, limit: float, **arguments: Any) -> Row:
    """Ask a process; one that is lost is started again for the next workload."""
    try:
        return process.ask(what, limit=limit, **arguments)
    except LostError as problem:
        process.restart()
        return {"failed": str(problem)}


def empty_row(workload: Workload, name: str) -> Row:
    """Return a row with every key, as yet without measurements."""
    provider = PROVIDERS.get(name)
    empty = dict.fromkeys(
        ("median_ms", "p20_ms", "p80_ms", "ratio_to_plain", "ratio_to_own_plain", "images_per_s", *MEASURED)
    )
    return {
        "family": "step",
        "operation": workload.network,
        "sweep": "step",
        "provider": name,
        "size": workload.numbers(),
        "dtype": _dtype(workload, provider),
        "layout": provider.layout if provider else "channels_last",
        "device": workload.device,
        "exact": provider.exact if provider else None,
        **empty,
        "gradient_error": None,
    }


def _dtype(workload: Workload, provider: Provider | None) -> str:
    if provider is not None and provider.amp:
        return "bfloat16 autocast"
    return "tf32" if workload.tf32 else "float32"


def _reason(row: Row) -> str | None:
    return row.get("unavailable") or row.get("failed")


def gate(rows: Mapping[str, Row], name: str, tolerance: float) -> Row:
    """Refuse a gradient that should be exact and is not."""
    error, provider = rows[name]["gradient_error"], PROVIDERS.get(name)
    if provider is None or not provider.exact or error is None:
        return {}
    bound = _bound(rows, tolerance)
    if error <= bound:
        return {}
    return {"failed": f"gradient error {error:.1e} is more than {bound:.1e}: not timed"}


def _bound(rows: Mapping[str, Row], tolerance: float) -> float:
    """Return the largest error that rounding explains.

    An activation that is zero but for rounding lets its gradient through a ReLU or not at random, and such a
    gradient gives its sign to the penalty: one of them costs a few thousandths of the whole gradient, in the
    plain step too. Deep networks have many: there twice the error of eager double backprop in the same type,
    in either layout, is allowed.
    """
    found = [rows.get(name, {}).get("gradient_error") for name in EAGER]
    return max([tolerance, *(2 * error for error in found if error is not None)])


def _statistics(workload: Workload, times: Mapping[str, list[float]], name: str) -> Row:
    low, median, high = quantiles(times[name])
    plain = quantiles(times[PLAIN])[1]
    own = PROVIDERS[name].beside if name in PROVIDERS else PLAIN
    return {
        "median_ms": round(median, 3),
        "p20_ms": round(low, 3),
        "p80_ms": round(high, 3),
        "ratio_to_plain": round(median / plain, 3),
        "ratio_to_own_plain": round(median / quantiles(times[own])[1], 3) if own in times else None,
        "images_per_s": round(1e3 * workload.batch / median, 1),
    }
