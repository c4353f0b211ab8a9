"""Steps under DistributedDataParallel, on a CPU with gloo: the plain one, eager double backprop and ours."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import gradl1_fast as gl
from bench.measure import peak_bytes, quantiles
from bench.oracle import relative_error, true_gradients
from bench.providers import LAMBDA, PROVIDERS, SCALE
from bench.step import Settings, empty_row
from bench.steps import Penalised
from bench.workloads import Workload
from gradl1_fast.training.demo.speed import EagerPenalty

__all__ = ["measure_ranks"]

Row = dict[str, Any]
TOLERANCE = Settings().tolerance


def measure_ranks(workload: Workload, ranks: int, rounds: int) -> list[Row]:
    """Return a row for each provider, measured on rank 0; every rank has the workload's batch.

    All ranks have the same batch, so that the mean of their gradients is the one of a single process, and
    the oracle's: a provider that is far from it is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, str(Path(folder)), workload, rounds)
        mp.spawn(_rank, args=arguments, nprocs=ranks)
        return torch.load(Path(folder) / "rows.pt", weights_only=True)


def _rank(rank: int, ranks: int, folder: str, workload: Workload, rounds: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    steps = {name: _step(workload, name) for name in ("plain", "eager double backprop", "gradl1_fast")}
    errors = {name: _error(workload, name, step) for name, step in steps.items()}
    bound = max(TOLERANCE, 2 * errors["eager double backprop"])
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    if wrong:
        raise RuntimeError(f"wrong gradients under DistributedDataParallel, nothing was timed: {wrong}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, rounds):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    peaks = {name: peak_bytes(step, torch.device("cpu")) for name, step in steps.items()}
    if rank == 0:
        torch.save(
            [_row(workload, ranks, n, times, (peaks[n], errors[n])) for n in steps], f"{folder}/rows.pt"
        )
    dist.destroy_process_group()


def _step(workload: Workload, name: str) -> Penalised:
    task = workload.task()
    model = task.network()
    if name == "plain":
        return Penalised(task, DistributedDataParallel(model))
    if name == "gradl1_fast":
        model = gl.convert(model)
        return Penalised(task, DistributedDataParallel(model), gl.GradL1(model, LAMBDA, LAMBDA, SCALE))
    penalty = EagerPenalty(model, LAMBDA, LAMBDA)
    return Penalised(task, DistributedDataParallel(model), penalty)


def _error(workload: Workload, name: str, step: Penalised) -> float:
    task, terms = workload.task(), PROVIDERS[name].terms
    gradients = {key.removeprefix("module."): g for key, g in step.gradients().items()}
    return relative_error(gradients, true_gradients(task.make, task.x, task.y, *terms))


def _row(
    workload: Workload, ranks: int, name: str, times: dict[str, list[float]], found: tuple[int, float]
) -> Row:
    low, median, high = quantiles(times[name])
    measured = {
        "median_ms": round(median, 3),
        "p20_ms": round(low, 3),
        "p80_ms": round(high, 3),
        "ratio_to_plain": round(median / quantiles(times["plain"])[1], 3),
        "images_per_s": round(1e3 * workload.batch * ranks / median, 1),
        "peak_bytes": found[0],
        "gradient_error": found[1],
    }
    return {**empty_row(workload, name), **measured}
