"""``gradl1 bench scale``: how time and memory of a step grow with batch, width, depth and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import step
from bench.ranks import measure_ranks
from bench.workloads import Workload

__all__ = ["measure"]

Row = dict[str, Any]
PROVIDERS = ("plain", "eager double backprop", "finite difference", "gradl1_fast")
Growth = dict[str, tuple[int, ...]]
GROWTH: Growth = {"batch": (4, 8, 16, 32), "width": (8, 16, 32, 64), "depth": (4, 8, 16, 32)}
SMOKE: Growth = {"batch": (2, 4), "width": (2, 4), "depth": (1, 2)}
RANKS = (1, 2)


def measure(device: str, *, smoke: bool = False, rounds: int = 7) -> list[Row]:
    """Return a row for each factor, value and provider.

    A stack of equal convolutions grows in one factor at a time; under DDP, with gloo on a CPU, the
    batch of each rank stays as it is and the threads are shared out.

    Args:
        device: ``"cpu"`` or ``"cuda"``; ranks are measured on a CPU alone.
        smoke: tiny sizes.
        rounds: timed steps of each provider.
    """
    if smoke:
        growth, middle = SMOKE, Workload("stack", 4, 2, 8, 2)
    elif device == "cuda":
        growth = {"batch": (32, 64, 128, 256), "width": (32, 64, 128, 256), "depth": (4, 8, 16, 32)}
        middle = Workload("stack", 64, 128, 32, 8, device=device)
    else:
        growth, middle = GROWTH, Workload("stack", 16, 16, 32, 8)
    rows = _grown(growth, middle, rounds, 1 if smoke else None)
    return rows + (_ranks(middle, rounds) if device == "cpu" else [])


def _grown(growth: Growth, middle: Workload, rounds: int, threads: int | None) -> list[Row]:
    todo = [(factor, value) for factor, values in growth.items() for value in values]
    workloads = [_with(middle, factor, value) for factor, value in todo]
    settings = step.Settings(rounds=rounds, providers=PROVIDERS, floors=False, threads=threads)
    found: list[Row] = []

    def done(_: Workload, rows: Sequence[Row]) -> None:
        factor, value = todo[len(found) // len(PROVIDERS)]
        found.extend(_about(row, factor, value) for row in rows)

    step.measure(workloads, settings, done)
    return found


def _with(workload: Workload, factor: str, value: int) -> Workload:
    return Workload(**{**workload.asdict(), factor: value})


def _about(row: Row, factor: str, value: int) -> Row:
    return {**row, "family": "scale", "sweep": factor, "value": value}


def _ranks(middle: Workload, rounds: int) -> list[Row]:
    rows = []
    for ranks in RANKS:
        for row in measure_ranks(middle, ranks, rounds):
            rows.append(_about(row, "ranks", ranks))
    return rows
